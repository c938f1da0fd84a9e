#!/bin/bash
# A recipe on one machine, a process for each GPU:
#   recipes/cluster/one_machine.sh mrdpo --config recipes/configs/published/salmonn2_plus/mrdpo.yaml
# PROCESSES says how many instead (for a CPU, or to leave a GPU to the judge).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
[[ -x $here/.venv/bin/torchrun ]] && PATH="$here/.venv/bin:$PATH"

recipe=$1
shift
# A process that dies (out of memory, a GPU that drops out) ends all others; torchrun starts them again, twice at the most,
# and the run goes on from its files.
exec torchrun --standalone --nproc_per_node="${PROCESSES:-gpu}" --max_restarts=2 "$here/recipes/$recipe.py" "$@"
