"""Compiles every kernel of src/cuda by NVRTC for some architectures, without a GPU, and prints what registers and memory they take.

    pip download --no-deps nvidia-cuda-nvrtc==13.0.88 && unzip nvidia_cuda_nvrtc*.whl
    python scripts/cuda-kernels.py nvidia/cu13/lib/libnvrtc.so.13 [sm_80 sm_90 ...]
"""

import ctypes
import pathlib
import re
import sys

SOURCES = pathlib.Path(__file__).parent.parent / "src/cuda"


def compile_kernels(nvrtc, path, architecture):
    """The log of one file for one architecture."""
    shared = "".join((SOURCES / name).read_text() for name in ("common.cuh", "tiles.cuh"))
    program = ctypes.c_void_p()
    text = (shared + path.read_text()).encode()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, path.name.encode(), 0, None, None)
    options = [f"--gpu-architecture={architecture}".encode(), b"--ptxas-options=-v"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    return failed, log.value.decode()


def main():
    nvrtc = ctypes.CDLL(sys.argv[1])
    bad = False
    for architecture in sys.argv[2:] or ["sm_80", "sm_90", "sm_100"]:
        for path in sorted(SOURCES.glob("*.cu")):
            failed, log = compile_kernels(nvrtc, path, architecture)
            bad |= bool(failed)
            print(f"{path.name} for {architecture}: {'FAILED' if failed else 'compiled'}")
            if failed:
                print(log)
                continue
            entries = re.findall(r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores.*?Used (\d+) registers", log, re.S)
            for name, spilled, registers in entries:
                print(f"    {name}: {registers} registers" + (f", {spilled} bytes spilled" if spilled != "0" else ""))
    sys.exit(bad)


main()
