# An empty volume and POSTGRES_PASSWORD -> a server that asks everybody for a password.
set -eu
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    printf '%s\n' "$POSTGRES_PASSWORD" > /tmp/password
    initdb --username postgres --pwfile /tmp/password --auth scram-sha-256 --encoding UTF8 --locale C.UTF-8
    echo 'host all all all scram-sha-256' >> "$PGDATA/pg_hba.conf"
    rm /tmp/password
fi
# Podman 4.3 leaves a tmpfs below /run to root.
exec postgres -c listen_addresses='*' -c unix_socket_directories=/tmp
