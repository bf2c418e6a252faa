"""The real command: killed in the middle, finished by two workers, its best config trained."""

import json
import signal

import pytest

WORDS = "digits --trials 5 --stop none --model resnet8 --width 8 --kernels plain --steps 24 --eval-every 0.5 --batch 64"
WORDS += " --optim.lr 0.001 --range batch=fixed"


@pytest.mark.slow
def test_killed_search_is_finished_by_two_workers(command, killed, tmp_path):
    words = ["train.search", *WORDS.split(), "--out", tmp_path / "s"]
    trials = tmp_path / "s" / "trials"
    assert killed(*words, when=(trials / "001" / "metrics.jsonl").exists) == -signal.SIGKILL
    assert not (tmp_path / "s" / "search.json").exists()

    done = command(*words, "--workers", 2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["trials"] == {"complete": 5}
    assert result["best"]["accuracy"] > result["first"]["accuracy"] + 0.2
    assert result["starts"] == 2  # the killed command and this one
    rows = json.loads((tmp_path / "s" / "search.json").read_text())["rows"]
    assert sum(row["restarts"] for row in rows) == 1 and "was interrupted: it goes on" in done.stderr
    for folder in trials.iterdir():
        assert {path.name for path in folder.iterdir()} == {"config.json", "metrics.jsonl", "result.json", "log.txt"}
        assert not [name for name in json.loads((folder / "result.json").read_text()) if name.startswith("test")]

    # The best config trains the same network, now with its test accuracy.
    best = command("train", "--config", tmp_path / "s" / "best.json", "--out", tmp_path / "best")
    assert best.returncode == 0, best.stderr
    trained = json.loads(best.stdout.splitlines()[-1])
    assert trained["validation_accuracy"] == result["best"]["accuracy"] and trained["test_accuracy"] > 0.3
