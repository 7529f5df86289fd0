"""Images of a task that is looked at and not registered: named as they would be, never built.

flytekit builds an ``ImageSpec`` while it serialises a task, unless the settings know the image already.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flytekit import ImageSpec
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.python_auto_container import update_image_spec_copy_handling

from kfpytorch_ray.errors import ConfigError, explain


def settings_for(task: Any, image: str | None = None) -> SerializationSettings:
    """Settings with which serialising a task builds no image.

    Args:
        task: Any Flyte task of a function.
        image: With a tag or a digest, for tasks that name none. None: flytekit's default image.

    Raises:
        ConfigError: That is no such name, or the name of an ImageSpec depends on files that cannot be found.
    """
    # flytekit would read a file as an ImageSpec, and build it.
    if image is not None and Path(image).is_file():
        problem = explain(
            f"{image!r} is a file.", "No image is built here.", "Name an image, such as registry.example/train:1."
        )
        raise ConfigError("image", (problem,))
    try:
        known = ImageConfig.auto_default_image() if image is None else ImageConfig.auto(img_name=image)
    except AssertionError as error:
        problem = explain(
            f"{image!r} has neither a tag nor a digest.",
            "flytekit takes no image without one.",
            "Name an image as registry.example/train:1.",
        )
        raise ConfigError("image", (problem,)) from error
    settings = SerializationSettings(project="project", domain="domain", version="version", image_config=known)
    named = [_image_of(spec, settings) for spec in _image_specs(task)]
    images = ImageConfig(default_image=known.default_image, images=[*(known.images or []), *named])
    return SerializationSettings(project="project", domain="domain", version="version", image_config=images)


def _image_specs(task: Any) -> list[ImageSpec]:
    # A map of a task has the task's.
    own = getattr(task, "python_function_task", task)
    pods = getattr(getattr(own, "pod_template", None), "pod_spec", None)
    images = [
        getattr(own, "container_image", None),
        *(container.image for container in getattr(pods, "containers", None) or []),
    ]
    return [image for image in images if isinstance(image, ImageSpec)]


def _image_of(spec: ImageSpec, settings: SerializationSettings) -> Image:
    """What flytekit finds in place of building an image."""
    # As flytekit does before it looks for the image: the id depends on it.
    update_image_spec_copy_handling(spec, settings)
    try:
        name, _, tag = spec.image_name().rpartition(":")
    except (ValueError, OSError) as error:
        problem = explain(
            f"the ImageSpec {spec.name!r} has no name yet.",
            f"Its name depends on files that cannot be read: {error}",
            "Run this where its files are, or name an image that is built.",
        )
        raise ConfigError("container_image", (problem,)) from error
    return Image(name=spec.id, fqn=name, tag=tag)
