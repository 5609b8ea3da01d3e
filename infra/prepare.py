"""An empty PostgreSQL and an empty S3 server -> databases, tables and buckets for MLflow and Prefect.

Run again it changes nothing, except that the databases' passwords become those of the environment.
"""

import os
import re
import subprocess
import sys
from typing import NoReturn

DATABASES = {"prefect": ["prefect"], "mlflow": ["mlflow", "mlflow_users"]}
"""Roles, and the databases that each owns; PREFECT_DATABASE_PASSWORD and so on are their passwords."""
BUCKETS = ["mlflow", "dvc"]
SECRETS = ["PGPASSWORD", "PREFECT_DATABASE_PASSWORD", "MLFLOW_DATABASE_PASSWORD", "PREFECT_PASSWORD",
           "MLFLOW_PASSWORD", "MLFLOW_SECRET_KEY", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY",
           "COOP_SERVE_TOKEN"]  # fmt: skip
_SHAPE = re.compile(r"[A-Za-z0-9_-]{16,}")
"""What stands in an address, in MLflow's file of users and behind a colon without any encoding."""


def main() -> None:
    if faults := [name for name in SECRETS if not _SHAPE.fullmatch(os.environ.get(name, ""))]:
        fail(f"{', '.join(faults)}: a secret has 16 characters or more of a-z, A-Z, 0-9, - and _, for it stands in "
             "addresses as it is; write another into infra/.env")  # fmt: skip
    make_databases()
    make_buckets()
    for command in (["mlflow", "db", "upgrade", os.environ["MLFLOW_BACKEND_STORE_URI"]],
                    ["prefect", "server", "database", "upgrade", "-y"]):  # fmt: skip
        if subprocess.run([sys.executable, "-m", *command]).returncode:
            fail(f"`{' '.join(command[:3])}` failed, and the lines above say why; nothing else was started")
    print("databases, tables and buckets are there")


def make_databases() -> None:
    """Roles and databases; where the server is and who makes them, libpq's own variables say (PGHOST, PGUSER, ...)."""
    import psycopg
    from psycopg import sql

    try:
        with psycopg.connect("dbname=postgres", autocommit=True) as connection:
            for role, databases in DATABASES.items():
                found = connection.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", [role]).fetchone()
                change = "ALTER" if found else "CREATE"
                password = os.environ[f"{role.upper()}_DATABASE_PASSWORD"]
                connection.execute(sql.SQL(change + " ROLE {} LOGIN PASSWORD {}").format(
                    sql.Identifier(role), sql.Literal(password)))  # fmt: skip
                for database in databases:
                    if connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [database]).fetchone():
                        continue
                    connection.execute(sql.SQL("CREATE DATABASE {} OWNER {}").format(
                        sql.Identifier(database), sql.Identifier(role)))  # fmt: skip
    except psycopg.OperationalError as error:
        fail(f"PostgreSQL at {os.environ.get('PGHOST')} says: {' '.join(str(error).split())}; a volume keeps the "
             "password of its first start: write that one into infra/.env")  # fmt: skip


def make_buckets() -> None:
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        s3 = boto3.client("s3")
        there = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
        for bucket in BUCKETS:
            if bucket not in there:
                s3.create_bucket(Bucket=bucket)
    except (BotoCoreError, ClientError) as error:
        fail(f"S3 at {os.environ.get('AWS_ENDPOINT_URL_S3')} says: {error}; correct its keys in infra/.env")


def fail(sentence: str) -> NoReturn:
    sys.stderr.write(f"error: {sentence}\n")
    sys.exit(2)


if __name__ == "__main__":
    main()
