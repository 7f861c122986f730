"""Training checkpoints of the official code, `g`, `d`, `g_ema`, `g_optim` and `d_optim`, as a run's state here, and back.

Adam's state has no names: it counts the parameters in the order of the module, which is that of the state dict beside it
without the blurs' kernels. A moment is then reshaped or permuted as the weight that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from . import official, official_discriminator
from .architectures import config_from_dict
from .checkpoint import load_state
from .config import DiscriminatorConfig, GeneratorConfig
from .discriminator import Discriminator
from .errors import UsageError
from .generator import Generator

KEYS = ("g", "d", "g_ema", "g_optim", "d_optim")
MOMENTS = ("exp_avg", "exp_avg_sq")
# of a parameter group what every version of Adam reads; what a newer one has besides, it fills in itself
_SETTINGS = ("lr", "betas", "eps", "weight_decay", "amsgrad")

Moments = dict[str, Any]  # "step", and by name those of MOMENTS
Convert = Callable[[Tensor], Tensor]


def is_official_training(state: Any) -> bool:
    """Whether what a file held comes from the official code: a training checkpoint, or a generator alone, which is then
    told from a foreign file when it is found to be without the rest.
    """
    signs = {"g_optim", "d_optim", "g_ema", "emb.input", "module.emb.input"}
    return isinstance(state, Mapping) and "format" not in state and not signs.isdisjoint(state)


def official_architectures(name: str, state: Mapping[str, Any]) -> tuple[GeneratorConfig, DiscriminatorConfig]:
    """The networks of an official training checkpoint.

    Args:
        name: of the file, for messages.
        state: what it holds.

    Raises:
        UsageError: a key of the checkpoint or of a state dict in it is missing, extra or misshapen; the averaged generator
            is of another architecture than the generator.
    """
    for key in KEYS:
        if key not in state:
            raise UsageError(f"{name}: key {key!r} is missing; a run is gone on with from {', '.join(KEYS)}")
        if not isinstance(state[key], Mapping):
            raise UsageError(f"{name}: key {key!r}: expected a state dict, got {type(state[key]).__name__}")
    found = []
    for key in ("g", "g_ema"):
        tensors = official.named_tensors(f"{name}: {key}", state[key])
        if sine := official.sine_key(tensors):
            raise UsageError(f"{name}: {key}: key {sine!r}: expected leaky ReLUs, since no key tells which sine a layer has")
        found.append(official.official_generator_config(f"{name}: {key}", tensors))
    if found[0] != found[1]:
        raise UsageError(f"{name}: key 'g_ema': expected the architecture of 'g', {found[0]}, got {found[1]}")
    d = official.named_tensors(f"{name}: d", state["d"])
    return found[0], official_discriminator.official_discriminator_config(f"{name}: d", d)


def from_official_training(name: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """An official training checkpoint in the form of `TrainingState.state_dict`, as far as it goes.

    Args:
        name: of the file, for messages.
        state: what it holds, on the CPU.

    Returns:
        "generator_config", "discriminator_config", "generator", "average", "discriminator", "g_optimizer", "d_optimizer",
        and "step", the iterations that the generator's Adam has counted (the official code has them in the file's name).

    Raises:
        UsageError: as `official_architectures`; an optimiser's state that does not belong to the parameters or is not
            Adam's, with the parameter's key.
    """
    g_config, d_config = official_architectures(name, state)
    generator, average = (Generator.from_official({"g": state[key]}) for key in ("g", "g_ema"))
    discriminator = Discriminator.from_official({"d": state["d"]})
    g_entries, d_names = _official_parameters(g_config, d_config)
    adam: dict[str, dict[str, Any]] = {}
    for key, module, names in (
        ("g", generator, {key: (entry.parameter, entry.to_parameter) for key, entry in g_entries.items()}),
        ("d", discriminator, {key: (parameter, _as_it_is) for key, parameter in d_names.items()}),
    ):
        # in the file's own order: that is the order in which its optimiser counted
        weights = official.named_tensors(f"{name}: {key}", state[key])
        shapes = {k: tuple(value.shape) for k, value in weights.items() if k in names}
        read = _read_adam(f"{name}: {key}_optim", state[f"{key}_optim"], shapes)
        moments = {names[k][0]: _converted(value, names[k][1]) for k, value in read.items()}
        order = [k for k, _ in module.named_parameters()]
        numbered = {number: moments[k] for number, k in enumerate(order) if k in moments}
        adam[key] = {"state": numbered, "param_groups": state[f"{key}_optim"]["param_groups"]}
    return {
        "step": max((int(value["step"]) for value in adam["g"]["state"].values()), default=0),
        "generator_config": g_config.to_dict(),
        "discriminator_config": d_config.to_dict(),
        "generator": generator.state_dict(),
        "average": average.state_dict(),
        "discriminator": discriminator.state_dict(),
        "g_optimizer": adam["g"],
        "d_optimizer": adam["d"],
    }


def to_official_training(name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A run's state as a training checkpoint from which the official code goes on: the inverse of `from_official_training`.

    Args:
        name: of the file, for messages.
        saved: what `TrainingState.state_dict` gave, on the CPU.

    Returns:
        "g", "d", "g_ema", "g_optim", "d_optim". The Adams have the run's own learning rates and betas, which the official
        code takes over. The iteration stands in the name of an official file, and nowhere in it.

    Raises:
        UsageError: a key is missing, extra or misshapen; networks that the official classes cannot be, whose field is named.
    """
    try:
        g_config = config_from_dict(saved["generator_config"])
        if not isinstance(g_config, GeneratorConfig):
            raise UsageError(f"{name}: a StyleGAN2, for which there is no official form of CIPS")
        d_config = DiscriminatorConfig.from_dict(saved["discriminator_config"])
        g_entries, d_names = _official_parameters(g_config, d_config)
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            generator, average, discriminator = Generator(g_config), Generator(g_config), Discriminator(d_config)
        for key, module in (("generator", generator), ("average", average), ("discriminator", discriminator)):
            load_state(f"{name}: {key}", module, saved[key])
        found: dict[str, Any] = {
            "g": generator.to_official(),
            "d": discriminator.to_official(),
            "g_ema": average.to_official(),
        }
        for key, module, names in (
            ("g", generator, {k: (entry.parameter, entry.to_official) for k, entry in g_entries.items()}),
            ("d", discriminator, {k: (parameter, _copied) for k, parameter in d_names.items()}),
        ):
            ours = saved[f"{key}_optimizer"]
            numbers = {k: number for number, (k, _) in enumerate(module.named_parameters())}
            state = {}
            for number, (parameter, convert) in enumerate(names.values()):
                if numbers[parameter] in ours["state"]:
                    moments = _converted(ours["state"][numbers[parameter]], convert)
                    # a number, as in the official code's day; newer versions of Adam make their tensor of it
                    state[number] = {**moments, "step": int(moments["step"])}
            (group,) = ours["param_groups"]
            settings = {setting: group[setting] for setting in _SETTINGS}
            found[f"{key}_optim"] = {"state": state, "param_groups": [{**settings, "params": list(range(len(names)))}]}
    except KeyError as error:
        raise UsageError(f"{name}: key {error.args[0]!r} is missing") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: {error}") from error
    return found


def _official_parameters(
    g_config: GeneratorConfig, d_config: DiscriminatorConfig
) -> tuple[dict[str, official.Entry], dict[str, str]]:
    """By official key, in the official order: of the generator the entries, of the discriminator our names."""
    g = {entry.key: entry for entry in official.entries(g_config)}
    d = {key: parameter for key, _, parameter in official_discriminator.entries(d_config) if parameter is not None}
    return g, d


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _copied(value: Tensor) -> Tensor:
    return value.clone(memory_format=torch.contiguous_format)


def _converted(moments: Moments, convert: Convert) -> Moments:
    return {"step": moments["step"], **{key: convert(moments[key]) for key in MOMENTS}}


def _read_adam(name: str, adam: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Moments]:
    """Adam's state by the parameter's official key; `shapes` has the keys in the order of the module.

    Parameters that have not had a gradient have no state.
    """
    for key in ("state", "param_groups"):
        if key not in adam:
            raise UsageError(f"{name}: key {key!r} is missing")
    try:
        # what a group lists is what the state is keyed by, whether it counts or, as once, gives addresses
        order = [number for group in adam["param_groups"] for number in group["params"]]
        states = dict(adam["state"])
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{name}: key 'param_groups': not the state of an optimiser ({error})") from error
    if len(order) != len(shapes):
        raise UsageError(f"{name}: key 'param_groups': expected {len(shapes)} parameters, got {len(order)}")
    if extra := [number for number in states if number not in order]:
        raise UsageError(f"{name}: key 'state': parameter {extra[0]!r} is in no group")
    found = {}
    for number, (key, shape) in zip(order, shapes.items()):
        if number not in states:
            continue
        where, moments = f"{name}: state of {key!r}", states[number]
        if not isinstance(moments, Mapping) or set(moments) != {"step", *MOMENTS}:
            came = ", ".join(map(str, moments)) if isinstance(moments, Mapping) else type(moments).__name__
            raise UsageError(f"{where}: expected Adam's step, {', '.join(MOMENTS)}, got {came or 'nothing'}")
        for moment in MOMENTS:
            value = moments[moment]
            if not isinstance(value, Tensor) or not value.is_floating_point() or tuple(value.shape) != shape:
                came = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"{where}: key {moment!r}: expected floating-point numbers of shape {list(shape)}, got {came}")
        try:
            # of its own for every parameter: Adam counts in place
            step = torch.tensor(float(moments["step"]))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{where}: key 'step': expected a number, got {type(moments['step']).__name__}") from error
        found[key] = {"step": step, **{moment: moments[moment] for moment in MOMENTS}}
    return found
