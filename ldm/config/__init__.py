"""Configs in the CompVis dialect: load, merge, override, check, build.

`target` names a class, `params` its arguments. A key that no constructor reads is an error with the YAML path and the
nearest accepted name, raised before anything is built. `compvis` translates configs published for Stable Diffusion v1,
`schema` checks values and allowed classes, `untrusted` bounds YAML of unknown origin.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import io
import pkgutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import ldm
from ldm.config.compvis import translate_compvis
from ldm.config.schema import ConfigError, check_sizes, check_target, check_values, is_trusted, mapping_at
from ldm.config.untrusted import check_references, check_yaml, checked_text

SECTIONS = {
    "": ("model", "data", "lightning", "prepare", "sampling"),
    "model": ("base_learning_rate", "target", "params"),
    "data": ("target", "params"),
    "lightning": ("trainer", "callbacks", "logger", "modelcheckpoint"),
    "sampling": ("frames", "fps", "window", "steps", "sampler", "scale", "motion_scale"),
}
# Name under lightning.callbacks -> the class where the config gives no `target`, and the node where the config does not
# name it (None: no callback). The class says whether a callback changes the training (`changes_training`).
CALLBACKS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "last_checkpoint": ("ldm.callbacks.LastCheckpoint", {}),
    "memory": ("ldm.callbacks.MemoryReport", {}),
    "plan": ("ldm.callbacks.reports.PlanReport", {}),
    "learning_rates": (
        "pytorch_lightning.callbacks.LearningRateMonitor", {"params": {"logging_interval": "step"}},
    ),
    "skip_bad_steps": ("ldm.callbacks.SkipBadSteps", {}),
    "unreadable_clips": ("ldm.callbacks.UnreadableClips", {}),
    "data_wait": ("ldm.callbacks.DataWait", {}),
    "progress": ("ldm.callbacks.ProgressLines", {}),
    "samples": ("ldm.callbacks.VideoLogger", None),
    "average": ("ldm.callbacks.WeightAverage", None),
}  # fmt: skip
DEFAULT_TARGETS = {
    "lightning.logger": "pytorch_lightning.loggers.TensorBoardLogger",
    "lightning.modelcheckpoint": "pytorch_lightning.callbacks.ModelCheckpoint",
    **{f"lightning.callbacks.{name}": target for name, (target, _) in CALLBACKS.items()},
}
# Old module -> new: configs, checkpoints and bundles may name classes by where they once were.
MOVED = {
    "ldm.callbacks.checkpoint_io": "ldm.callbacks.saving",
    "ldm.callbacks.compiling": "ldm.callbacks.compute",
    "ldm.callbacks.guard": "ldm.callbacks.bad_steps",
    "ldm.callbacks.plan": "ldm.callbacks.reports",
    "ldm.callbacks.sampling": "ldm.callbacks.samples",
    "ldm.callbacks.unreadable": "ldm.callbacks.bad_clips",
    "ldm.callbacks.videos": "ldm.callbacks.samples",
    "ldm.callbacks.waiting": "ldm.callbacks.reports",
    "ldm.data.drive_frames": "ldm.data.world.frames",
    "ldm.models.diffusion.host_states": "ldm.optim.per_weight",
    "ldm.models.diffusion.known": "ldm.sampling.denoisers",
    "ldm.models.diffusion.known_mixture": "ldm.diffusion.known_frames",
    "ldm.models.diffusion.memory_switches": "ldm.optim.stored_weights",
    "ldm.models.diffusion.noise": "ldm.diffusion.noise",
    "ldm.models.diffusion.optimizers": "ldm.optim",
    "ldm.models.diffusion.parameter_groups": "ldm.optim.parameter_groups",
    "ldm.models.diffusion.sampling": "ldm.sampling.loop",
    "ldm.models.diffusion.schedule": "ldm.diffusion.schedule",
    "ldm.models.diffusion.stages": "ldm.sampling.stages",
    "ldm.models.diffusion.step_judge": "ldm.optim.skippable",
    "ldm.models.diffusion.stored_weights": "ldm.optim.stored_weights",
    "ldm.models.diffusion.weight_by_weight": "ldm.optim.per_weight",
    "ldm.models.diffusion.windows": "ldm.sampling.denoisers",
    "ldm.models.remade_latents": "ldm.models.temporal_decoder",
    "ldm.modules.compiling": "ldm.modules.compiled",
    "ldm.modules.conditioning": "ldm.modules.unet",
    "ldm.modules.cuda_graphs": "ldm.modules.compiled",
    "ldm.modules.group_norm": "ldm.modules.nn",
    "ldm.modules.host_inputs": "ldm.modules.recompute",
    "ldm.modules.local_attention": "ldm.modules.temporal",
    "ldm.modules.projections": "ldm.modules.nn",
}
# Arguments of Lightning's Trainer that the config sets elsewhere, or not at all.
TRAINER_OWN = {"callbacks", "logger", "plugins", "default_root_dir", "enable_checkpointing", "model_registry"}
# Arguments that main.py fills in for constructors that ask for them.
SUPPLIED = ("learning_rate", "config", "saved_config", "folder", "save_dir")


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> DictConfig:
    """Merge YAML files from left to right, then `key=value` overrides; values are YAML (`1e-4` is a number).

    Moved targets get their new names, and CompVis configs are translated. Raises `ConfigError` for a missing or broken
    file, an override without `=` and an unknown section.
    """
    parts = [_read(Path(path)) for path in paths]
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key.strip() or key.startswith("-"):
            raise ConfigError(
                f"the override {override!r} is not of the form key=value, for instance data.params.batch_size=2"
            )
        _check_override(override, value)
    try:
        parts.append(OmegaConf.from_dotlist(list(overrides)))
        merged = OmegaConf.merge(*parts)
        if not is_trusted():
            check_references(OmegaConf.to_container(merged))
        OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        # TypeError: a list over a mapping
        raise ConfigError(f"{_sources(paths, overrides)}: {error}") from error
    _check_keys(merged, SECTIONS[""], "")
    return translate_compvis(OmegaConf.create(_with_current_targets(OmegaConf.to_container(merged))))


def build(node: Mapping[str, Any], path: str, **given: Any) -> Any:
    """Construct what `node` (`target` and `params`) describes.

    path: of `node` in the YAML, for error messages. given: arguments that the calling code supplies; `params` may not.
    """
    target, params = _check_node(node, path, given=tuple(given), optional=())
    return target(**params, **given)


def check_node(node: Mapping[str, Any], path: str) -> None:
    """Refuse what `build` would refuse before it constructs anything."""
    _check_node(node, path, given=(), optional=())


def find_target(node: Mapping[str, Any], path: str) -> type:
    """The class of `node`, by its `target` or its path; raises `ConfigError` for one that a config may not name."""
    return _import_target(_target_name(node, path), path)


def accepted_names(node: Mapping[str, Any], path: str) -> tuple[str, ...]:
    """The argument names that the target of `node` takes."""
    return tuple(_parameters(find_target(node, path)))


def callback_nodes(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The callbacks of a run by name: the default ones, which the config may change or, with null, leave out."""
    defaults = {name: node for name, (_, node) in CALLBACKS.items() if node is not None}
    nodes = {**defaults, **((config.get("lightning") or {}).get("callbacks") or {})}
    return {name: node for name, node in nodes.items() if node is not None}


def current_target(name: str) -> str:
    """The present dotted name of a class that may have moved."""
    module, _, attribute = name.rpartition(".")
    return f"{MOVED[module]}.{attribute}" if module in MOVED else name


def check(config: DictConfig) -> None:
    """Check every key of every section and of every `target` node at any depth, without building anything."""
    tree = to_container(config)
    _check_keys(tree, SECTIONS[""], "")
    for section, part in tree.items():
        _check_keys(mapping_at(section, part), SECTIONS.get(section, part or ()), section)
    for section in ("model", "data"):
        if tree.get(section) and "target" not in tree[section]:
            raise ConfigError(f"{section}: needs a `target`, the dotted name of the class to build")
    lightning = tree.get("lightning") or {}
    mapping_at("lightning.callbacks", lightning.get("callbacks"))
    if trainer := mapping_at("lightning.trainer", lightning.get("trainer")):
        accepted = set(_parameters(_find_class("pytorch_lightning.Trainer", ""))) - TRAINER_OWN
        _check_keys(trainer, {*accepted, "gpus"}, "lightning.trainer")
    for path, node in _nodes(tree):
        _check_node(node, path, given=(), optional=SUPPLIED)


def to_container(config: Any) -> Any:
    """A config, or a value of one, as plain dicts and lists, interpolations resolved: what goes into a checkpoint."""
    if OmegaConf.is_config(config):
        return OmegaConf.to_container(config, resolve=True)
    return {key: to_container(value) for key, value in config.items()} if isinstance(config, Mapping) else config


def nearest(name: str, accepted: Iterable[str]) -> str:
    """The end of an error message: the accepted name closest to `name`, or all of them."""
    accepted = sorted(accepted)
    close = difflib.get_close_matches(name, accepted, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"accepted here: {', '.join(accepted) or 'nothing'}"


def _read(path: Path) -> DictConfig:
    if not path.is_file():
        folder = path.parent
        beside = [str(folder / entry.name) for entry in folder.glob("*.yaml")] if folder.is_dir() else []
        raise ConfigError(f"{path}: no such config file; {nearest(str(path), beside)}")
    try:
        config = OmegaConf.load(io.StringIO(checked_text(path, is_trusted())))
    except (yaml.YAMLError, ValueError, OmegaConfBaseException, RecursionError, OSError) as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path}: expected a mapping with the keys {', '.join(SECTIONS[''])} at the top")
    return config


def _with_current_targets(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {
            key: current_target(value) if key == "target" and isinstance(value, str) else _with_current_targets(value)
            for key, value in tree.items()
        }
    return [_with_current_targets(value) for value in tree] if isinstance(tree, list) else tree


def _check_override(override: str, value: str) -> None:
    try:
        check_yaml(value, is_trusted())
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"the override {override[:200]!r} is not readable as YAML: {error}") from error


def _sources(paths: Sequence[str | Path], overrides: Sequence[str]) -> str:
    return " + ".join([*map(str, paths), *overrides])


def _check_keys(mapping: Mapping[str, Any], accepted: Iterable[str], path: str) -> None:
    accepted = tuple(accepted)
    for key in mapping:
        if key not in accepted:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(f"{where}: nothing reads this key; {nearest(str(key), accepted)}")


def _nodes(tree: Any, path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every mapping that has, or by its path implies, a `target`, outermost first."""
    if isinstance(tree, dict):
        if "target" in tree:
            yield path, tree
        elif path in DEFAULT_TARGETS:
            yield path, {"target": DEFAULT_TARGETS[path], **tree}
        elif path.rpartition(".")[0] == "lightning.callbacks":
            raise ConfigError(f"{path}: needs a `target`; {nearest(path, DEFAULT_TARGETS)}")
        for key, value in tree.items():
            yield from _nodes(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from _nodes(value, f"{path}[{index}]")


def _target_name(node: Mapping[str, Any], path: str) -> str:
    name = node.get("target", DEFAULT_TARGETS.get(path)) if isinstance(node, Mapping) else None
    if not isinstance(name, str):
        raise ConfigError(f"{path}: needs a `target`, the dotted name of the class to build")
    return current_target(name)


def _check_node(
    node: Mapping[str, Any], path: str, given: tuple[str, ...], optional: tuple[str, ...]
) -> tuple[type, dict[str, Any]]:
    name = _target_name(node, path)
    node = to_container(node)
    _check_keys(node, SECTIONS["model"] if path == "model" else ("target", "params"), path)
    params = node.get("params") or {}
    if not isinstance(params, dict):
        raise ConfigError(f"{path}.params: expected a mapping of arguments of {name}, found {params!r}")
    target = _import_target(name, path)
    check_sizes(params, f"{path}.params")
    parameters = _parameters(target)
    supplied = (*given, *(name for name in optional if name in parameters))
    for key in params:
        if key in supplied:
            raise ConfigError(f"{path}.params.{key}: the program sets this itself; leave it out of the config")
    _check_keys(params, [key for key in parameters if key not in supplied], f"{path}.params")
    missing = [
        key
        for key, parameter in parameters.items()
        if parameter.default is parameter.empty and key not in params and key not in supplied
    ]
    if missing:
        raise ConfigError(f"{path}.params: {name} needs {', '.join(missing)}, which the config does not give")
    annotations = {key: parameters[key].annotation for key in params}
    values = {key: value for key, value in params.items() if value is not None or parameters[key].default is not None}
    check_values(values, annotations, f"{path}.params")
    return target, params


def _parameters(target: type) -> dict[str, inspect.Parameter]:
    """The named parameters; **kwargs are not offered, since nothing could check them."""
    try:
        signature = inspect.signature(target, eval_str=True)
    except NameError:  # imported under TYPE_CHECKING
        signature = inspect.signature(target)
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: parameter for key, parameter in signature.parameters.items() if parameter.kind in named}


def _import_target(name: str, path: str) -> type:
    """The class that a config names; `ConfigError`, before its module is imported, for one that it may not."""
    if "." in name and name.partition(".")[0] != ldm.__name__:
        check_target(name, f"{path}.target")
    target = _find_class(name, path)
    check_target(name, f"{path}.target")
    return target


def _find_class(name: str, path: str) -> type:
    module_name, _, attribute = name.rpartition(".")
    where = f"{path}.target"
    if not module_name:
        raise ConfigError(f"{where}: expected a dotted name such as ldm.modules.unet.UNetModel, found {name!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise ConfigError(f"{where}: {name} needs the package {error.name!r}, which is not installed") from error
        modules = [found.name for found in pkgutil.walk_packages(ldm.__path__, "ldm.")]
        raise ConfigError(f"{where}: there is no module {module_name!r}; {nearest(module_name, modules)}") from error
    target = getattr(module, attribute, None)
    if not inspect.isclass(target):
        classes = [name for name, value in vars(module).items() if inspect.isclass(value)]
        raise ConfigError(f"{where}: {module_name} has no class {attribute!r}; {nearest(attribute, classes)}")
    if not f"{target.__module__}.".startswith(f"{module_name}."):
        home = f"{target.__module__}.{target.__qualname__}"
        raise ConfigError(f"{where}: {attribute!r} is defined in `{target.__module__}`; use target `{home}`")
    return target
