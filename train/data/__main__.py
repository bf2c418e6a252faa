"""`python -m train.data prepare NAME [--dir DIR]`: download a stock TFDS set and store it as ArrayRecord."""

from train.data.prepare import prepare
from train.data.prepared import default_data_dir
from train.errors import OneLineParser, one_line
from train.paths import local_path


def main() -> None:
    """Parse the command line, prepare the set, and print its folder."""
    parser = OneLineParser(prog="python -m train.data", description=__doc__)
    parser.add_argument("command", choices=["prepare"])
    parser.add_argument("name")
    parser.add_argument("--dir", type=local_path, default=default_data_dir(), help="the TFDS data_dir")
    args = parser.parse_args()
    print(prepare(args.name, args.dir))


if __name__ == "__main__":
    with one_line():
        main()
