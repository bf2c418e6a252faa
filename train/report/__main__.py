"""Show which run is better, and why: `python -m train.report RUN...` writes one page about runs of any kind."""

from collections.abc import Sequence
from pathlib import Path

from train.errors import OneLineParser, UsageError, one_line
from train.json_text import to_json
from train.paths import check_file, local_path
from train.report import collect, draw, run_name


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page about the runs, or the JSON file and the picture that the flags name."""
    parser = OneLineParser(prog="python -m train.report", description=__doc__)
    parser.add_argument("runs", nargs="+", type=local_path, help="run folders, or JSON files written by --json")
    parser.add_argument(
        "--html",
        type=local_path,
        help="write the page here, and its pictures to the folder of that name (default: RUN/report.html for one run "
        "folder, else report.html; not written if only --json or --picture is given)",
    )
    parser.add_argument("--json", type=local_path, help="write the run with its history here (takes one run)")
    parser.add_argument("--picture", type=local_path, help="draw the curves here, as .png, .svg or .pdf")
    args = parser.parse_args(argv)
    if args.json and len(args.runs) > 1:
        raise UsageError("--json takes one run")
    if args.json:
        check_file(args.json)
    if args.json or args.picture:
        runs = {run_name(run, args.runs): collect(run) for run in args.runs}
    if args.json:
        try:
            args.json.write_text(to_json(*runs.values(), indent=1) + "\n")
        except OSError as error:
            raise UsageError(f"cannot write {args.json}: {error.strerror}") from None
    if args.picture:
        draw(runs, args.picture)
    if args.html or not (args.json or args.picture):
        write_page(args.runs, args.html)


def write_page(paths: Sequence[Path], html: Path | None) -> None:
    """Write the page about runs to `html`, or to its default place, and print where.

    Raises:
      UsageError: a run cannot be read, a file cannot be written, or matplotlib is not installed.
    """
    from train.report.overview import write
    from train.report.records import read_run

    runs = [read_run(path, paths) for path in dict.fromkeys(paths)]
    one_folder = len(paths) == 1 and paths[0].is_dir()
    page, *pictures = write(runs, html or (paths[0] if one_folder else Path()) / "report.html")
    print(f"{page}\n{len(pictures)} pictures in {page.with_suffix('')}")


if __name__ == "__main__":
    with one_line():
        main()
