#!/usr/bin/env python3
"""Compiles CUDA C++ with NVRTC, which takes neither a GPU nor its driver: .ci/nvrtc.py WHEELS FOLDER

WHEELS has NVIDIA's wheels nvidia-cuda-nvrtc-cu12 (the compiler), nvidia-cuda-runtime-cu12 and nvidia-cuda-nvcc-cu12
(headers), FOLDER the texts, as `cargo run -p bitnet-burn-cube --features lower --example lower -- FOLDER` writes them. Each one has to compile
for every architecture below, and where it multiplies by __dp4a or by matrix units, the instruction has to be there.
"""
import ctypes
import pathlib
import re
import sys
import tempfile
import zipfile

# Ampere's and Hopper's data centre cards; the latter also as CubeCL compiles for it.
ARCHITECTURES = ["sm_80", "sm_90", "sm_90a"]


def compiler(wheels, into):
    """Unpacks the wheels; the library, and the folder of the headers."""
    for name in ["nvidia_cuda_nvrtc_cu12", "nvidia_cuda_runtime_cu12", "nvidia_cuda_nvcc_cu12"]:
        found = sorted(wheels.glob(f"{name}-*.whl"))
        if not found:
            sys.exit(f"{wheels}: no wheel of {name}")
        zipfile.ZipFile(found[-1]).extractall(into)
    nvidia = into / "nvidia"
    # Loaded first, as the compiler would look for it on the system.
    for builtins in (nvidia / "cuda_nvrtc/lib").glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
    libraries = [path for path in (nvidia / "cuda_nvrtc/lib").glob("libnvrtc.so.*") if "alt" not in path.name]
    if len(libraries) != 1:
        sys.exit(f"{wheels}: {len(libraries)} libraries of NVRTC, where one was expected")
    headers = ["cuda_runtime/include", "cuda_nvcc/include"]
    return ctypes.CDLL(str(libraries[0])), [nvidia / path for path in headers]


def text_of(nvrtc, program, what):
    """A program's PTX, or the compiler's log."""
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, text)
    return text.value.decode()


def ptx(nvrtc, include, source, architecture):
    """PTX, or None and what the compiler says."""
    program = ctypes.c_void_p()
    if nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None):
        return None, "NVRTC makes no program of it"
    # CubeCL's options.
    options = [f"--gpu-architecture={architecture}", "-lineinfo"]
    options += [f"--include-path={path}" for path in include]
    options = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)
    log = text_of(nvrtc, program, "ProgramLog")
    made = None if status else text_of(nvrtc, program, "PTX")
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return made, log


def problem_of(source, made, log):
    """What is wrong with a text's PTX, or None."""
    if made is None:
        return f"does not compile:\n{log}"
    entry = re.search(r"__global__\s+void\s+(?:__\w+__\s*\([^)]*\)\s*)?(\w+)\s*\(", source)
    if not entry or f".entry {entry[1]}(" not in made:
        return f"has no entry point in\n{made[:2000]}"
    if "__dp4a" in source and not re.search(r"\bdp4a\.", made):
        return "calls __dp4a, and its PTX has no dp4a"
    if "mma_sync(" in source and not re.search(r"\bwmma\.mma\.", made):
        return "multiplies by matrix units, and its PTX does not"
    return None


def self_test(nvrtc, include):
    """That a wrong text is found: with a compiler that says yes to all, nothing would be shown."""
    right = 'extern "C" __global__ void f(int *y) { y[0] = __dp4a(y[1], y[2], y[3]); }'
    for source, expected in [
        (right, None),
        (right.replace("y[1]", "z[1]"), "does not compile"),
        (right.replace("__dp4a", "/* __dp4a */ min").replace(", y[3])", ")"), "no dp4a"),
        (right.replace("__global__", "__device__"), "no entry point"),
    ]:
        found = problem_of(source, *ptx(nvrtc, include, source, ARCHITECTURES[0]))
        if (found is None) != (expected is None) or expected and expected not in found:
            sys.exit(f"self-test: {source}: {found}")


def main():
    wheels, folder = map(pathlib.Path, sys.argv[1:])
    texts = sorted(folder.glob("*.cu"))
    with tempfile.TemporaryDirectory() as unpacked:
        nvrtc, include = compiler(wheels, pathlib.Path(unpacked))
        self_test(nvrtc, include)
        wrong = dp4a = 0
        for path in texts:
            source = path.read_text()
            dp4a += "__dp4a" in source
            for architecture in ARCHITECTURES:
                found = problem_of(source, *ptx(nvrtc, include, source, architecture))
                if found:
                    wrong += 1
                    print(f"{path.name}, {architecture}: {found}", file=sys.stderr)
    print(f"{len(texts)} texts for {', '.join(ARCHITECTURES)}: {wrong} failures; {dp4a} texts multiply by __dp4a")
    # Without texts, or without int8 products in any, something else went wrong before.
    sys.exit(wrong > 0 or not texts or not dp4a)


main()
