"""Kubernetes resources as text that ``kubectl apply -f -`` reads as they are: YAML for people, JSON for scripts.

kubectl reads some texts that PyYAML does not quote as numbers or booleans, such as a variable's value ``1e-4``, and
then refuses the resource. They are quoted here.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_FIRST = ("apiVersion", "kind", "metadata", "name", "namespace", "spec", "image")
"""Keys that come first, where people look for them; others stay as they were put together."""

_NUMBER = re.compile(r"[-+]?(\.[0-9_]+|[0-9][0-9_]*(\.[0-9_]*)?)(e[-+]?[0-9_]+)?|[-+]?0[box][0-9a-f_]+", re.IGNORECASE)
_BOOLEANS = frozenset({"y", "n"})
"""Of go-yaml, in any case, beside those that PyYAML knows of."""

_OTHER_LINE_ENDS = frozenset("\x85\u2028\u2029")


def as_yaml(manifests: Sequence[Mapping[str, Any]]) -> str:
    """YAML documents, with ``---`` between them; neither aliases nor folded lines."""
    ordered = [_ordered(manifest) for manifest in manifests]
    text: str = yaml.dump_all(ordered, Dumper=_Dumper, sort_keys=False, width=sys.maxsize, allow_unicode=True)
    return text


def as_json(manifests: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object: the resource, or a ``List`` of several."""
    one = manifests[0] if len(manifests) == 1 else {"apiVersion": "v1", "kind": "List", "items": list(manifests)}
    return json.dumps(_ordered(one), indent=2) + "\n"


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        keys = [*(key for key in _FIRST if key in value), *(key for key in value if key not in _FIRST)]
        return {key: _ordered(value[key]) for key in keys}
    if isinstance(value, list | tuple):
        return [_ordered(one) for one in value]
    return value


class _Dumper(yaml.SafeDumper):  # type: ignore[misc] # PyYAML ships no py.typed
    def ignore_aliases(self, data: Any) -> bool:
        """Write everything out where it belongs."""
        return True


def _write_text(dumper: _Dumper, value: str) -> Any:
    style = None
    if _OTHER_LINE_ENDS.intersection(value):
        # Elsewhere they would be read as line ends, and be lost.
        style = '"'
    elif "\n" in value and not value[0].isspace():
        style = "|"
    elif _NUMBER.fullmatch(value) or value.lower() in _BOOLEANS:
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _write_text)
