#!/bin/sh
# Starts nginx in front of a server, in the foreground: in its pod, in the tests, and on a laptop with
#
#   sh cluster/base/proxy/start.sh
#
# The environment may say each value otherwise; seconds are whole numbers.
set -eu
PATH=$PATH:/usr/sbin # Debian has nginx there, where users do not look

: "${AF2_PROXY_LISTEN:=127.0.0.1:8080}"   # where requests come in
: "${AF2_PROXY_LIVE:=127.0.0.1:8081}"     # where /live says that nginx itself is well
: "${AF2_PROXY_UPSTREAM:=127.0.0.1:8000}" # Ray Serve
: "${AF2_PROXY_BODY_MB:=64}"              # MiB of a request: the recipe's serve.max_body_mb
: "${AF2_PROXY_REQUESTS:=384}"            # at one time, of all callers; each may take BODY_MB + 16 MiB of disk
: "${AF2_PROXY_ADDRESS_REQUESTS:=128}"    # at one time, of one address
: "${AF2_PROXY_HEADER_S:=10}"             # for a whole header
: "${AF2_PROXY_BODY_S:=10}"               # between two pieces of a body; nginx has no bound for a whole one
: "${AF2_PROXY_SEND_S:=10}"               # between two pieces of an answer that its reader takes
: "${AF2_PROXY_ANSWER_S:=150}"            # between two pieces from Ray: more than the recipe's serve.request_timeout_s

here=$(cd "$(dirname "$0")" && pwd)
folder=${AF2_PROXY_FOLDER:-$(mktemp -d "${TMPDIR:-/tmp}/af2_proxy.XXXXXX")} # bodies and answers on their way
chmod 711 "$folder" 2>/dev/null || true # started by root, nginx works as another user; a pod's volume is root's
ulimit -n "$(ulimit -Hn)" 2>/dev/null || true # a request takes up to four open files

# nginx does not start without the address of its upstream, and KubeRay makes that name with the first server.
trap 'exit 0' QUIT TERM
until getent ahosts "${AF2_PROXY_UPSTREAM%:*}" >/dev/null; do
    echo "waiting for the name ${AF2_PROXY_UPSTREAM%:*}: is the RayService there?" >&2
    sleep 5
done

sed -e "s|@LISTEN@|$AF2_PROXY_LISTEN|" \
    -e "s|@LIVE@|$AF2_PROXY_LIVE|" \
    -e "s|@UPSTREAM@|$AF2_PROXY_UPSTREAM|" \
    -e "s|@BODY_MB@|$AF2_PROXY_BODY_MB|" \
    -e "s|@REQUESTS@|$AF2_PROXY_REQUESTS|" \
    -e "s|@ADDRESS_REQUESTS@|$AF2_PROXY_ADDRESS_REQUESTS|" \
    -e "s|@HEADER_S@|$AF2_PROXY_HEADER_S|" \
    -e "s|@BODY_S@|$AF2_PROXY_BODY_S|" \
    -e "s|@SEND_S@|$AF2_PROXY_SEND_S|" \
    -e "s|@ANSWER_S@|$AF2_PROXY_ANSWER_S|" \
    "$here/nginx.conf" >"$folder/nginx.conf"
exec nginx -p "$folder" -c "$folder/nginx.conf" -e stderr -g 'daemon off;'
