#!/usr/bin/env bash
# Disaggregated serving: one engine computes prompts, another answers.
# `disagg_kvbm.sh --help` says what can be chosen.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/engines.sh"
launch "disagg_kvbm.sh" --prefill 1 --decode 1 "$@"
