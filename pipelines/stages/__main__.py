"""`python -m pipelines.stages NAME`: one stage of dvc.yaml, with a sentence for what goes wrong while it is imported.

Imports nothing but the standard library until it can catch what an import raises.
"""

import sys
from typing import Any


def main() -> None:
    try:
        from pipelines import console

        console.run(lambda: _imported(sys.argv[1]).main())
    except ImportError as error:
        sys.stderr.write(f"error: {error}: this Python ({sys.executable}) lacks what the project installs: "
                         "put .venv/bin first on PATH, or run `make demo`\n")  # fmt: skip
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _imported(stage: str) -> Any:
    from importlib import import_module

    from pipelines.environment import without_collecting

    with without_collecting():
        return import_module(f"pipelines.stages.{stage}")


if __name__ == "__main__":
    main()
