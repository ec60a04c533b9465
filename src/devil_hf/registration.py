"""Makes transformers' Auto classes know this package's classes, without importing transformers before somebody needs it.

`import devil_hf` only puts a finder in front of Python's. It watches imports of transformers and of this package, and once one of
transformers' `auto` modules (or the model) has been imported, and nothing that it watches is half imported any more, it registers
the classes as anyone would, and steps aside. Without that, `import devil_hf` and `devil --help` would import torch.
"""

import sys
import threading
from contextlib import suppress
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

AUTO = "transformers.models.auto."
TRIGGERS = (f"{AUTO}configuration_auto", f"{AUTO}auto_factory", "devil_hf.model.modeling_devil")
WATCHED = ("transformers", "devil_hf", "peft")  # which imports transformers


def register() -> None:
    """Register configuration, model, translators and processors, and how models are made."""
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    import devil_hf.baselines.baselines_devil  # these enter themselves in `COMPANIONS`
    import devil_hf.build.hooks_devil
    import devil_hf.build.lora_devil
    import devil_hf.build.slim_devil
    import devil_hf.build.timm_devil
    import devil_hf.build.transformers_devil
    import devil_hf.checkpoints.decoding
    import devil_hf.model.pipeline_devil  # registers its task
    from devil_hf.build import from_backbone_and_language_model
    from devil_hf.extras import MissingExtraError
    from devil_hf.model.configuration_devil import DevilConfig
    from devil_hf.model.image_processing_devil import DevilImageProcessor
    from devil_hf.model.modeling_devil import DevilModel
    from devil_hf.model.processing_devil import DevilProcessor

    with suppress(MissingExtraError):  # without the extra `train` nothing is hidden, and nothing trains
        import devil_hf.training.draws  # noqa: F401 - registers what training hides

    AutoConfig.register(DevilConfig.model_type, DevilConfig)
    AutoModel.register(DevilConfig, DevilModel)
    AutoModelForImageTextToText.register(DevilConfig, DevilModel)
    # PIL whatever backend is asked for: only its resampling equals the backbones' own preprocessing.
    AutoImageProcessor.register(
        DevilConfig, image_processor_classes={"pil": DevilImageProcessor, "torchvision": DevilImageProcessor}
    )
    AutoProcessor.register(DevilConfig, DevilProcessor)
    # What travels with a checkpoint does not build new models; whoever has the package finds it here, too.
    DevilModel.from_backbone_and_language_model = staticmethod(from_backbone_and_language_model)  # type: ignore[attr-defined]


def register_when_needed() -> None:
    """Register now if transformers' Auto classes are there already, otherwise as soon as they are."""
    if any(name in sys.modules for name in TRIGGERS):
        register()
    else:
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds what Python finds, and knows how many imports of watched modules are under way, in all threads."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.depth = 0
        self.wanted = False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] not in WATCHED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Counting(spec.loader, self, name)
        return spec

    def begin(self) -> None:
        """Before a module is imported."""
        with self.lock:
            self.depth += 1

    def end(self, name: str) -> None:
        """After a module has been imported, or could not be."""
        with self.lock:
            self.depth -= 1
            self.wanted = self.wanted or name in TRIGGERS
            ready = self.wanted and self.depth == 0 and self in sys.meta_path
            if ready:
                sys.meta_path.remove(self)
        if ready:
            register()


class _Counting(Loader):
    """A loader that tells when it is done."""

    def __init__(self, loader: Any, watch: _Watch, name: str):
        self.loader, self.watch, self.name = loader, watch, name

    def __getattr__(self, name: str) -> Any:  # get_source, get_data, is_package and what else the loader has
        return getattr(self.loader, name)

    def create_module(self, spec: ModuleSpec) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__loader__ = module.__spec__.loader = self.loader
        self.watch.begin()
        try:
            self.loader.exec_module(module)
        except BaseException:
            self.watch.end("")
            raise
        self.watch.end(self.name)


__all__ = ["register", "register_when_needed"]
