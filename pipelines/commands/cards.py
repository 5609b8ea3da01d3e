"""Cards: the JSON beside a prompt -> lines for reading."""

from typing import Any


def as_text(tree: Any, indent: str = "") -> str:
    """A card for reading: one `key: value` a line, nested by indentation."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            lines.append(f"{indent}{key}:")
            lines.append(as_text(value, indent + "  "))
        elif isinstance(value, list):
            shown = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in value)
            lines.append(f"{indent}{key}: {shown}")
        elif value != {}:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(line for line in lines if line)
