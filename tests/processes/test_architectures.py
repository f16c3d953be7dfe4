"""The table of architectures against llama.cpp itself, which is asked about a file that says nothing else (2 s)."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import gguf
import xllamacpp

from corral.declarations import read_yaml

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "corral" / "components" / "llama" / "architectures.yaml"
INVENTED = "brandnew9"
UNKNOWN = "unknown model architecture: '"
Parameters = type("Parameters", (ctypes.Structure,), {"_fields_": [("bytes", ctypes.c_uint8 * 80)]})


def test_the_build_knows_what_the_table_says_and_no_picture_model(tmp_path: Path) -> None:
    table = read_yaml(TABLE)
    known, pictures = table["known"], table["pictures"]
    for name in (*known, *pictures, INVENTED):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", name)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    command = [sys.executable, "-m", __name__, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-500:]
    refused = {part.partition("'")[0] for part in done.stderr.split(UNKNOWN)[1:]}
    assert refused == {*pictures, INVENTED}


def main() -> None:
    """Lets llama.cpp try each file of a folder; it says on stderr what it does not know."""
    library = ctypes.CDLL(str(Path(xllamacpp.__file__).with_name("xllamacpp.abi3.so")))
    defaults, load = library.llama_model_default_params, library.llama_model_load_from_file
    defaults.restype = Parameters
    load.restype, load.argtypes = ctypes.c_void_p, [ctypes.c_char_p, Parameters]
    for path in Path(sys.argv[1]).iterdir():
        load(str(path).encode(), defaults())


if __name__ == "__main__":
    main()
