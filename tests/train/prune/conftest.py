"""The runs of pruning that test_run.py and test_deliver.py share."""

from collections.abc import Callable

import jax
import pytest

from resnet_jax.parallel import make_mesh
from resnet_jax.resnet import MODELS
from tests.train.prune.runs import ALIKE, NETWORK, TWO_BLOCKS, Pruned, prune
from train import session as session_module
from train.__main__ import main


@pytest.fixture(scope="package")
def small(tfds_dir):
    """Runs of this process are on one of its devices, and may be of the smaller network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "two_blocks", TWO_BLOCKS)
        patch.setattr(session_module, "make_mesh", lambda: make_mesh(jax.devices()[:1]))
        # All of them read the same images, once.
        read, images = session_module.read_data, {}

        def read_once(config, dataset):
            if str(config.data) not in images:
                images[str(config.data)] = read(config, dataset)
            return images[str(config.data)]

        patch.setattr(session_module, "read_data", read_once)
        yield


@pytest.fixture(scope="package")
def dense(small, tmp_path_factory):
    """The folder of the dense run that all others prune: two epochs."""
    out = tmp_path_factory.mktemp("dense") / "run"
    main(["digits", *NETWORK, "--steps", "40", "--optim.warmup-epochs", "0.5", *ALIKE, "--out", str(out)])
    return out


@pytest.fixture(scope="package")
def pruned(dense, tmp_path_factory) -> Callable[..., Pruned]:
    """`pruned(*GRADUAL)` prunes the dense run like this, once."""
    made: dict[tuple[str, ...], Pruned] = {}

    def prune_dense(*more):
        if more not in made:
            made[more] = prune(dense, *more, "--out", tmp_path_factory.mktemp("pruned") / "run")
        return made[more]

    return prune_dense
