#!/usr/bin/env bash
# Aggregated serving: one engine that does all of it, behind a router.
# `agg_kvbm.sh --help` says what can be chosen.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"
launch "agg_kvbm.sh" --engines 1 "$@"
