"""Which stored tensors become which weights of a model, and which of them are its vision tower's.

transformers 5 renames, splits and joins stored tensors while it loads; older releases take them as they are,
but for the path to the tower. That path is found by looking: it is what the stored names of the tower's
weights begin with.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Source:
    """Stored tensors and the weights that come of them; mostly one and one.

    Attributes:
        targets: names of the weights in the model.
        stored: (name in the checkpoint, pattern of `converter` that it matched).
        converter: transformers' WeightConverter; None where the tensor is taken as it is.
    """

    targets: tuple[str, ...]
    stored: list[tuple[str, str]] = field(default_factory=list)
    converter: Any = None

    def weights(self, tensors: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
        """The weights, by name; the stored tensors are taken out of `tensors`."""
        if self.converter is None:
            return {self.targets[0]: tensors.pop(self.stored[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.stored:
            converter.add_tensor(self.targets[0], name, pattern, tensors.pop(name))
        made = converter.convert(self.targets[0], model=model, config=model.config)
        return {name: made[name][0] if isinstance(made[name], list) else made[name] for name in made}


@dataclass(frozen=True)
class Selection:
    """What a tower's weights come from.

    Attributes:
        prefix: what the names of its weights begin with, such as 'model.visual.'.
        sources: all that begin so and are its weights.
        missing: its weights that come of nothing.
        left_over: names that begin so and are no weights of it.
    """

    prefix: str
    sources: tuple[Source, ...]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]


def sources(stored: Iterable[str], model: nn.Module) -> list[Source]:
    """What becomes of every stored tensor when transformers loads `model`.

    Args:
        stored: names in the checkpoint.
        model: the whole model; may be on the meta device.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError:  # transformers 4
        return [Source((name,), [(name, name)]) for name in stored]
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    expected: Any = model.state_dict()
    base: Any = model.base_model_prefix
    found: dict[str, Source] = {}
    for name in sorted(stored, key=dot_natural_key):  # some renamings depend on what came before
        target, pattern = rename_source_key(name, renamings, converters, base, expected)
        if target not in expected and name in expected:
            target, pattern = rename_source_key(name, [], [], base, expected)
        converter = None if pattern is None else by_pattern[pattern]
        source = found.setdefault(target, Source(_targets(target, converter), [], converter))
        source.stored.append((name, pattern or name))
    return list(found.values())


def _targets(first: str, converter: Any) -> tuple[str, ...]:
    """The names of all weights that `converter` makes, of the name of the first."""
    if converter is None:
        return (first,)
    patterns = converter.target_patterns
    return tuple(first.replace(patterns[0], pattern) for pattern in patterns)


def select(sources: Iterable[Source], wanted: Collection[str], path: str) -> Selection:
    """The sources of a tower's weights, found by their names.

    Args:
        sources: those of the whole checkpoint.
        wanted: names of the tower's weights, as the tower itself has them.
        path: of the tower in the model; decides where several parts of the model have all of these names.
    """
    by_target = {target: source for source in sources for target in source.targets}
    prefix = _common_prefix(by_target, wanted, path)
    begin_so = [target for target in by_target if target.startswith(prefix)] if prefix else list(wanted)
    chosen = {id(by_target[target]): by_target[target] for target in begin_so if target in by_target}
    return Selection(
        prefix,
        tuple(s for s in chosen.values() if any(t.removeprefix(prefix) in wanted for t in s.targets)),
        tuple(name for name in wanted if prefix + name not in by_target),
        tuple(name for name in begin_so if name.removeprefix(prefix) not in wanted),
    )


def _common_prefix(names: Mapping[str, object], wanted: Collection[str], path: str) -> str:
    """What most of `wanted` have in front of them among `names`; `path` itself where there are none."""
    counts: Counter[str] = Counter()
    known = set(wanted)
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in known:
                counts["".join(f"{part}." for part in parts[:depth])] += 1
    own = f"{path}." if path else ""
    return max(counts, key=lambda prefix: (counts[prefix], prefix == own), default=own)
