"""`python -m pipelines.flows.bootstrap http://HOST:4200/api`: what a Prefect server needs before our flows come to it.

The server's login is in PREFECT_API_AUTH_STRING. Imports nothing but the standard library until it can catch what an
import raises.
"""

import sys


def main() -> None:
    try:
        from pipelines import console
        from pipelines.flows.pools import bootstrap
        from pipelines.settings import load_settings
    except ImportError as error:
        sys.stderr.write(f"error: {error}: this Python ({sys.executable}) lacks what the project installs: "
                         "put .venv/bin first on PATH, or run `make demo`\n")  # fmt: skip
        sys.exit(2)
    address, *flags = sys.argv[1:] or [""]
    if not address.startswith("http") or flags not in ([], ["--without-workers"]):
        console.fail("name the server: python -m pipelines.flows.bootstrap http://HOST:4200/api")

    def run() -> None:
        given = load_settings().notify_url
        bootstrap(address, notify_url=given.get_secret_value() if given else None, without_workers=bool(flags))

    console.run(run)


if __name__ == "__main__":
    main()
