#!/bin/sh
# A Prefect server and a checkout -> pools, automation and deployments there, and the checkout's DVC remote on S3.
# Run again it changes nothing. PREFECT_API_URL, PREFECT_API_AUTH_STRING, AWS_ENDPOINT_URL_S3 say where.
set -eu
fail() { echo "error: $1" >&2; exit 2; }

test -d .git || fail "PROJECT_FOLDER is no checkout: \`git clone\` the project into a folder for the services alone"
test -w .git || fail "user $(id -u) may not write in PROJECT_FOLDER: \`chown -R\` it, or set PROJECT_USER to its owner"

# What a team has set itself stays; the keys come from the environment of the workers.
if ! dvc config --local remote.storage.url > /dev/null 2>&1; then
    dvc remote modify --local storage url s3://dvc
    dvc remote modify --local storage endpointurl "$AWS_ENDPOINT_URL_S3"
fi
python -m pipelines.flows.bootstrap "$PREFECT_API_URL"
