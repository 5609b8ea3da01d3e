"""`python -m pipelines.flows.bootstrap http://HOST:4200/api`: what a Prefect server needs of us, deployments included.

The server's login is in PREFECT_API_AUTH_STRING. Imports nothing but the standard library until it can catch what an
import raises.
"""

import sys


def main() -> None:
    try:
        from pipelines import console
        from pipelines.environment import use_prefect_server
        from pipelines.flows.deploying import deploy
        from pipelines.flows.pools import bootstrap
        from pipelines.settings import load_settings
    except ImportError as error:
        sys.stderr.write(f"error: {error}: this Python ({sys.executable}) lacks what the project installs: "
                         "put .venv/bin first on PATH, or run `make demo`\n")  # fmt: skip
        sys.exit(2)
    address, *flags = sys.argv[1:] or [""]
    if not address.startswith("http") or not set(flags) <= {"--without-workers", "--without-deployments"}:
        console.fail("name the server: python -m pipelines.flows.bootstrap http://HOST:4200/api")

    def prepare() -> None:
        given = load_settings().notify_url
        bootstrap(address, notify_url=given.get_secret_value() if given else None,
                  without_workers="--without-workers" in flags)  # fmt: skip
        if "--without-deployments" not in flags:
            use_prefect_server(address)
            deploy()

    console.run(prepare)


if __name__ == "__main__":
    main()
