#!/bin/sh
# Puts a renewed certificate to work in HAProxy: chain and key into one file, checked, then a reload.
#
#   certbot certonly --standalone --http-01-port 8888 -d NAME --deploy-hook /etc/haproxy/certbot-deploy-hook.sh
#
# certbot sets RENEWED_LINEAGE. Whatever fails, the certificate that is in use stays, and certbot reports the exit code.
# HAPROXY_CERT, HAPROXY_CFG and HAPROXY_RELOAD say otherwise than the defaults below.
set -eu
lineage=${RENEWED_LINEAGE:?certbot sets it; by hand: the folder with fullchain.pem and privkey.pem}
config=${HAPROXY_CFG:-/etc/haproxy/haproxy.cfg}
target=${HAPROXY_CERT:-/etc/haproxy/certs/yquant.pem}

fail() {
    echo "certbot-deploy-hook: $1; $target is as it was" >&2
    exit 1
}

new=$(mktemp "$target.XXXXXX") # 0600: nobody but its owner reads the key
old=$new.old
trap 'rm -f "$new" "$old"' EXIT
cat "$lineage/fullchain.pem" "$lineage/privkey.pem" >"$new"
openssl x509 -in "$new" -noout -checkend 172800 >/dev/null || fail "the certificate ends within two days"
[ "$(openssl x509 -in "$new" -noout -pubkey)" = "$(openssl pkey -in "$new" -pubout)" ] ||
    fail "the key is not the certificate's"

# The folder's owner is the user who runs `haproxy -c` before a switch.
chown --reference="$(dirname "$target")" "$new"

# The lock that `switch` holds: no reload in the middle of a switch, whose proof it would spoil.
exec 9>>"$(readlink -f "$config").lock"
flock -w 120 9 || fail "a switch has held the lock for 2 minutes"
if [ -e "$target" ]; then cp -p "$target" "$old"; fi
mv "$new" "$target"
haproxy -c -q -f "$config" || {
    if [ -e "$old" ]; then mv "$old" "$target"; fi
    fail "HAProxy refuses its configuration with the new certificate"
}
# shellcheck disable=SC2086  # a command and its arguments
${HAPROXY_RELOAD:-systemctl reload haproxy}
