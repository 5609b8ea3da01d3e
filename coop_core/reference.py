"""Reference: what a prompt saw of its test images -> a file beside its card, covered by the card's digest; and back."""

from pathlib import Path

from coop_core.artifact import write_card
from coop_core.backbone import digest_tensors
from coop_core.errors import ArtifactError
from coop_core.files import read_json, read_tensors, write_tensors
from coop_core.judging.seen import Seen

FILE = "reference.safetensors"


def add_reference(prompt: Path, file: Path) -> None:
    """Put what the prompt saw of its test images beside its card, and the digest into the card."""
    tensors, _ = read_tensors(file)
    write_tensors(prompt / FILE, tensors)
    card = read_json(prompt / "card.json")
    write_card(prompt, {**card, "digests": {**card["digests"], "reference": digest_tensors(tensors)}})


def read_reference(prompt: Path) -> Seen | None:
    """What an artefact saw of its test images; None where it carries nothing of them.

    Raises
    ------
    ArtifactError
        When the file is missing, damaged, or not the one the card was written for.
    """
    digest = read_json(prompt / "card.json")["digests"].get("reference")
    if digest is None:
        return None
    tensors, _ = read_tensors(prompt / FILE)
    if digest_tensors(tensors) != digest:
        raise ArtifactError(f"{prompt / FILE} is not the file its card was written for: restore it, or train again")
    return Seen.from_tensors(tensors)
