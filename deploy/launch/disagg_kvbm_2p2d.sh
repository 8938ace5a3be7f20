#!/usr/bin/env bash
# Disaggregated serving with two engines that compute prompts and two that answer.
# `disagg_kvbm_2p2d.sh --help` says what can be chosen.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"
launch "disagg_kvbm_2p2d.sh" --prefill 2 --decode 2 "$@"
