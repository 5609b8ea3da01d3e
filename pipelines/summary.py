"""What a finished run shows in the terminal."""

from typing import Any

from rich.table import Table


def headline_table(evaluation: dict[str, Any]) -> Table:
    """Each classifier on the same test images, with the change against zero-shot."""
    classifiers = evaluation["classifiers"]
    n = classifiers["zero-shot"]["n"]
    table = Table(
        title=f"{evaluation['dataset']}: {n} test images, {evaluation['shots']} shots, seed {evaluation['seed']}",
        caption="gain: points against zero-shot; ECE: expected calibration error",
    )
    table.add_column("classifier", no_wrap=True)
    for column in ("top-1", "95 % interval", "gain", "macro-F1", "ECE"):
        table.add_column(column, justify="right")
    zero_shot = classifiers["zero-shot"]["accuracy"]
    for name, e in classifiers.items():
        learned = name == evaluation["method"]
        gain = "" if name == "zero-shot" else f"{100 * (e['accuracy'] - zero_shot):+.1f}"
        low, high = e["interval"]
        table.add_row(
            name, f"{100 * e['accuracy']:.1f} %", f"{100 * low:.1f} - {100 * high:.1f}", gain,
            f"{100 * e['macro_f1']:.1f} %", f"{100 * e['calibration_error']:.1f} %",
            style="bold green" if learned else None,
        )  # fmt: skip
    return table
