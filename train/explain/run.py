"""Explain a network: load it and its images, compute heat maps, scores and views, and write the report."""

import time
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.explain import Network
from train.data.decode import silence_pillow
from train.drawing import new_figure
from train.errors import UsageError
from train.explain.attributions import COUNTEREXAMPLE, REFERENCE, explain_images
from train.explain.config import ExplainConfig
from train.explain.dataset import VIEWS, View, check_views
from train.explain.images import pixels_of
from train.explain.inside import inside_view
from train.explain.pages import attribution_view, cascade_view, open_out, write_report
from train.explain.subject import Subject
from train.run_folder import environment
from train.runtime import keep_compiled, say
from train.trained import load_trained


def explain(source: str, paths: Sequence[str], config: ExplainConfig) -> dict[str, Any]:
    """Explain a network, and write index.html, scores.json and pictures to `config.out`.

    Args:
      source: a run folder, a sparse file in one, or a model by name; see `train.trained.load_trained`.
      paths: images and folders; without any, some images of the set are explained.

    Returns:
      What scores.json holds: each method's mean scores, each image's prediction and scores, and the numbers of views.

    Raises:
      UsageError: see `train.explain.config.check`; an image or a network that cannot be read, a class or a layer that
        does not exist, a folder that cannot be written to, a missing extra.
    """
    started = time.monotonic()
    out = open_out(str(config.out))
    new_figure(1, 1)  # without matplotlib, stop here
    silence_pillow()
    keep_compiled()
    trained = load_trained(source, encoders=True, kernels="auto")
    subject = Subject(source, trained, config)
    images, pixels = subject.images(paths), pixels_of(trained)
    shown = np.concatenate([np.asarray(pixels.see(image[None])) for image in images.pixels])
    layer = layer_of(Network(trained.model, trained.variables), shown[:1], config.layer)
    views = () if config.dataset is None else check_views(config.dataset, subject)

    sections: dict[str, View] = {}
    if config.methods:
        seen = subject.outputs_of(images.pixels)
        aim, network = subject.aim(images, seen)
        exposed = (COUNTEREXAMPLE,) if config.cascade else ()
        methods = tuple(dict.fromkeys((*config.methods, *exposed, REFERENCE)))
        options = {"layer": layer, "batch": config.batch, "seed": config.seed, "dtype": trained.dtype}
        say(f"explaining {len(images.names)} images by {', '.join(methods)}")
        found = {}
        for name, attribution in explain_images(network, shown, aim, methods, every_layer=config.cascade, **options):
            found[name] = attribution
            say(f"{name}: " + ", ".join(f"{score} {x.mean():.3f}" for score, x in attribution.scores.items()))
        visible = pixels.show(shown)
        sections["Images"] = attribution_view(images, visible, trained.classes, seen, aim, found)
        if config.cascade:
            sections["Random weights, layer by layer"] = cascade_view(visible[0], images.names[0], found)
    if config.features:
        say("filters, feature maps, and images that excite the network")
        sections["Inside the network"] = inside_view(trained, pixels, jnp.asarray(shown[:1]), layer, config.seed)
    for name in views:
        say(f"{name} of {subject.dataset.name}")
        title, draw = VIEWS[name]
        view = draw(subject, images)
        sections[title] = view._replace(numbers={name: view.numbers})
    about = {"run": source, "layer": layer, "seed": config.seed, "seconds": round(time.monotonic() - started, 2)}
    return write_report(out, sections, {**about, **environment()})


def layer_of(network: Network, image: np.ndarray, layer: str | None) -> str:
    """The path of a layer, or of the last map.

    Raises:
      UsageError: an unknown layer (the message lists the known ones), or one whose output is not a map.
    """
    try:
        path, output = network.find(layer, jnp.asarray(image))
    except ValueError as error:
        raise UsageError(f"--layer: {error}") from None
    if len(output.shape) != 4:
        raise UsageError(f"--layer {path}: its output is not a map [B, h, w, K]")
    return path
