# shellcheck shell=sh
# The cards of a host as nvidia-smi prints them; `_card` in observe.py reads these cells in this order.
if command -v nvidia-smi >/dev/null 2>&1; then
    fields=index,uuid,pci.bus_id,name,memory.total,memory.used,utilization.gpu,temperature.gpu,driver_version,compute_cap
    nvidia-smi --query-gpu="$fields" --format=csv,noheader,nounits 2>&1
    echo "code $?"
fi
