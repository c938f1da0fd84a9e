#!/bin/bash
# Run a recipe on one machine with one process per GPU:
#   recipes/cluster/one_machine.sh mrdpo --config recipes/configs/published/salmonn2_plus/mrdpo.yaml
# PROCESSES sets another number of processes (for a CPU, or to leave a GPU to the judge).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ -x $here/.venv/bin/torchrun ]] && PATH="$here/.venv/bin:$PATH"

recipe=$1
shift
# If a process dies (out of memory, a failing GPU), all others stop. torchrun restarts them at most twice, and the run resumes
# from its files.
exec torchrun --standalone --nproc_per_node="${PROCESSES:-gpu}" --max_restarts=2 "$here/recipes/$recipe.py" "$@"
