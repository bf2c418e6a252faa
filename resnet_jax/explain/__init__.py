"""Explanations of any network as pure functions: heat maps, features, and scores of how far to trust them.

A heat map of each image, and how fast the class goes when its hottest pixels are deleted first:

    network = Network(model, variables)
    method = jax.jit(METHODS["grad_cam"], static_argnames="layer")
    heat = method(network, images, class_score(labels), key=key, layer="stage4")  # float32 [B, H, W]
    scores = area(deletion(network, images, class_probability(labels), heat))
"""

# fmt: off
from resnet_jax.explain.cam import eigen_cam, grad_cam, grad_cam_plus_plus, hires_cam, layer_cam, score_cam
from resnet_jax.explain.cascading import cascade, randomization, rank_correlation, ssim
from resnet_jax.explain.features import Goal, channel_goal, feature_maps, filters, output_goal, visualize
from resnet_jax.explain.gradients import (
    guided_backprop,
    input_x_gradient,
    integrated_gradients,
    saliency,
    smooth_grad,
)
from resnet_jax.explain.maps import blur, grid, rescale, upsample
from resnet_jax.explain.methods import METHODS, Method
from resnet_jax.explain.network import Network
from resnet_jax.explain.perturbation import occlusion, rise
from resnet_jax.explain.targets import Target, class_difference, class_probability, class_score, similarity
from resnet_jax.explain.trust import (
    Perturb,
    Road,
    area,
    completeness_error,
    deletion,
    impute,
    infidelity,
    insertion,
    road,
    square_removal,
)

__all__ = [
    "METHODS",
    "Goal",
    "Method",
    "Network",
    "Perturb",
    "Road",
    "Target",
    "area",
    "blur",
    "cascade",
    "channel_goal",
    "class_difference",
    "class_probability",
    "class_score",
    "completeness_error",
    "deletion",
    "eigen_cam",
    "feature_maps",
    "filters",
    "grad_cam",
    "grad_cam_plus_plus",
    "grid",
    "guided_backprop",
    "hires_cam",
    "impute",
    "infidelity",
    "input_x_gradient",
    "insertion",
    "integrated_gradients",
    "layer_cam",
    "occlusion",
    "output_goal",
    "randomization",
    "rank_correlation",
    "rescale",
    "rise",
    "road",
    "saliency",
    "score_cam",
    "similarity",
    "smooth_grad",
    "square_removal",
    "ssim",
    "upsample",
    "visualize",
]
# fmt: on
