"""Gates on the compiled kernels: `compile.py CUDA_FOLDER SOURCE OUT [--json]`. Called by compile.sh."""

import json
import os
import pathlib
import re
import subprocess
import sys

cuda, source, out = map(pathlib.Path, sys.argv[1:4])
as_json = "--json" in sys.argv
# cuobjdump looks for its disassembler there.
os.environ["PATH"] += f":{cuda / 'bin'}"

# Architectures, and what NVRTC's cubin is called after.
ARCHS = {"sm_80": "sm_80", "sm_90a": "sm_90a", "sm_100a": "sm_100a", "sm_120": "sm_120a"}
# Threads of each kernel, which with its registers decide how many thread blocks a multiprocessor holds.
REGISTERS = 255
# Registers beyond which fewer than two thread blocks fit (65536 registers of a multiprocessor).
BOUNDS = {"matmul_128": 128, "matmul_segmented_128": 255, "matmul_experts_128": 128, "matmul_segmented_experts_128": 255,
          "sample": 64, "report": 64, "adjust": 64, "fetch_extents": 104, "sum_extents": 80, "copy_extents": 80}
SHARED_STATIC = 48 << 10
KERNELS = {"sm_80": 45, "sm_90a": 63, "sm_100a": 45, "sm_120": 45}
# Kernels that give whole warpgroups to the tensor cores.
WARPGROUPS = r"matmul_(segmented_)?(64_|64_narrow_|f8_64_)?hopper"
# Kernels for few rows, fed by the copy engine.
COPIES = r"matmul_(segmented_)?(16_|64_|16_narrow_|64_narrow_|f8_|f8_64_|f8_whole_|f8_whole_narrow_|whole_|whole_narrow_)hopper"

passed = failed = 0


def check(name, value, unit, target, ok):
    global passed, failed
    passed, failed = passed + ok, failed + (not ok)
    if as_json:
        print(json.dumps({"name": name, "value": value, "unit": unit, "target": target, "ok": bool(ok)}))
    elif not ok:
        print(f"FAILED {name}: {value} {unit}, expected {target}")


def usage(log):
    """Per kernel: registers, bytes of static shared memory, bytes of stack, spills."""
    found, name = {}, None
    for line in log.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            name = entry[1]
            found[name] = {"registers": 0, "shared": 0, "stack": 0, "spills": 0}
        if name is None:
            continue
        if spills := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, spills.groups())
            found[name].update(stack=stack, spills=stores + loads)
        if registers := re.search(r"Used (\d+) registers", line):
            found[name]["registers"] = int(registers[1])
        if shared := re.search(r"(\d+) bytes smem", line):
            found[name]["shared"] = int(shared[1])
    return found


def instructions(cubin):
    """Machine code of each kernel."""
    text = subprocess.run([cuda / "bin/cuobjdump", "-sass", cubin], capture_output=True, text=True).stdout
    parts = re.split(r"Function : (\w+)", text)
    return dict(zip(parts[1::2], parts[2::2]))


for arch, own in ARCHS.items():
    cubin = out / f"{arch}.cubin"
    command = [cuda / "bin/nvcc", "-cubin", f"-arch={arch}", "-O3", "-fmad=false", "-std=c++17", "-Xptxas", "-v", "-o", cubin, source]
    compiled = subprocess.run(command, capture_output=True, text=True)
    check(f"{arch} compiles", compiled.returncode, "exit code", 0, compiled.returncode == 0)
    if compiled.returncode:
        print(compiled.stderr[-4000:])
        continue
    kernels = usage(compiled.stdout + compiled.stderr)
    check(f"{arch} kernels", len(kernels), "kernels", KERNELS[arch], len(kernels) == KERNELS[arch])
    for name, used in sorted(kernels.items()):
        bound = BOUNDS.get(name, REGISTERS)
        check(f"{arch} {name} registers", used["registers"], "registers", bound, used["registers"] <= bound)
        check(f"{arch} {name} spills", used["spills"] + used["stack"], "bytes", 0, used["spills"] + used["stack"] == 0)
        check(f"{arch} {name} shared", used["shared"], "bytes", SHARED_STATIC, used["shared"] <= SHARED_STATIC)
    by_nvrtc = list((out / "cubins").glob(f"*-{own}-*.cubin"))
    check(f"{arch} by NVRTC", len(by_nvrtc), "cubins", 1, len(by_nvrtc) == 1)
    # What workers load, not what nvcc made.
    for name, code in instructions(by_nvrtc[0] if by_nvrtc else cubin).items():
        if not re.match(r"matmul_|attention_(prefill|decode)_", name):
            continue
        tensor = len(re.findall(r"\bHGMMA\." if re.fullmatch(WARPGROUPS, name) else r"\bHMMA\.", code))
        check(f"{arch} {name} tensor cores", tensor, "instructions", 1, tensor >= 1)
        if re.fullmatch(COPIES, name):
            copies = len(re.findall(r"\bUTMALDG\.|\bUBLKCP\.", code))
            check(f"{arch} {name} copy engine", copies, "instructions", 1, copies >= 1)
        local = len(re.findall(r"\b(STL|LDL)\b", code))
        check(f"{arch} {name} local memory", local, "instructions", 0, local == 0)

print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
