#!/usr/bin/env bash
# Installs what the tests of the report open it with: Debian's Chromium and its driver. Needs root; does nothing if they
# are there.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
