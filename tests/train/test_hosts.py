"""Two processes with four devices each, acting as two hosts, give the same result as a single process."""

import json
import socket

import pytest

ARGUMENTS = ["train", "--model", "resnet8", "--width", "8", "--steps", "12", "--batch", "64", "--save-steps", "5"]
ARGUMENTS += ["--log", "tensorboard", "--profile", "3:4"]  # only the first host writes, and all compute the same calls


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


@pytest.mark.slow
def test_two_hosts_equal_one(command, tmp_path):
    def outputs(out, hosts, devices):
        where = f"localhost:{free_port()}"
        extra = [[]] if hosts == 1 else [["--distributed", f"{where},{hosts},{index}"] for index in range(hosts)]
        arguments = [*ARGUMENTS, "--out", tmp_path / out]
        env = {"JAX_NUM_CPU_DEVICES": str(devices)}
        processes = [command(*arguments, *more, start=True, env=env) for more in extra]
        try:
            return [(*process.communicate(timeout=600), process.returncode) for process in processes]
        finally:
            for process in processes:
                process.kill()

    ((single, _, _),) = outputs("one", 1, 8)
    (first, said, code), (second, silence, code2) = outputs("two", 2, 4)
    assert (code, code2) == (0, 0), said + silence
    assert "{" not in second  # the first host alone has a result; gloo greets from both
    one, two = (json.loads(said.splitlines()[-1]) for said in (single, first))
    assert two["devices"].startswith("8 x")
    assert two["test_loss"] == pytest.approx(one["test_loss"], rel=1e-4)
    assert two["test_images"] == one["test_images"] == 360
    assert len([*(tmp_path / "two" / "tensorboard").iterdir()]) == 1
    assert len([*(tmp_path / "two" / "profile").rglob("*.xplane.pb")]) == 1
    # And what two hosts saved, one goes on from.
    (tmp_path / "two" / "result.json").unlink()
    ((again, said, code),) = outputs("two", 1, 1)
    assert code == 0, said
    assert "resuming from step 12" in said
    assert json.loads(again)["params_digest"] == two["params_digest"]
