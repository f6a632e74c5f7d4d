"""Attributes of an image, and what `rbd info` says."""

from collections.abc import Mapping
from typing import Any


def compare(found: Mapping[str, str], info: Mapping[str, Any]) -> None:
    """Attributes and what `rbd info` says are the same."""
    assert found["id"] == info["id"]
    assert found["features"] == ", ".join(info["features"])
    assert found["flags"] == ", ".join(info["flags"])
    assert found["object_size"] == str(info["object_size"])
    assert found["stripe_unit"] == str(info.get("stripe_unit", info["object_size"]))
    assert found["stripe_count"] == str(info.get("stripe_count", 1))
    assert found["data_pool"] == info.get("data_pool", "")
    assert found["block_name_prefix"] == info["block_name_prefix"]
    for which in ("create", "access", "modify"):
        assert found[f"{which}_timestamp"] == info[f"{which}_timestamp"]
    parent = info.get("parent")
    assert found["parent"] == (parent_spec(parent) if parent else "")
    assert found["parent_overlap"] == (str(parent["overlap"]) if parent else "")
    assert found.get("protected", "").lower() == info.get("protected", "")


def parent_spec(parent: Mapping[str, Any]) -> str:
    """A parent as `rbd info` writes it without --format json."""
    trash = f" (trash {parent['id']})" if parent["trash"] else ""
    namespace = f"{parent['pool_namespace']}/" if parent["pool_namespace"] else ""
    return f"{parent['pool']}/{namespace}{parent['image']}@{parent['snapshot']}{trash}"
