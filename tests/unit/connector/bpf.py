"""A classic BPF machine: what net/core/filter.c does with the instructions that our programs may use, and the checks of
bpf_check_classic(). Loads are big-endian; a load outside the packet ends the program with 0 (drop).
"""

MAX_INSTRUCTIONS = 4096
WORDS = 2**32

# Instruction classes and fields, from include/uapi/linux/bpf_common.h.
LD, LDX, ST, STX, ALU, JMP, RET, MISC = range(8)
SIZES = {0x00: 4, 0x08: 2, 0x10: 1}
ABS, IMM, MEM = 0x20, 0x00, 0x60


def check(program):
    """Reject what the kernel would reject."""
    assert 0 < len(program) <= MAX_INSTRUCTIONS, "BPF_MAXINSNS"
    for n, (code, jt, jf, k) in enumerate(program):
        assert 0 <= code < 2**16
        assert 0 <= jt < 256
        assert 0 <= jf < 256
        assert 0 <= k < WORDS
        if code & 7 == JMP:
            targets = [n + 1 + k] if code & 0xF0 == 0x00 else [n + 1 + jt, n + 1 + jf]
            assert all(target < len(program) for target in targets), f"instruction {n} jumps out of the program"
    assert program[-1][0] & 7 == RET, "the last instruction must return"


def run(program, packet):
    """Return how many bytes of the packet are kept: 0 drops it. No program keeps everything."""
    if not program:
        return WORDS - 1
    a = x = n = 0
    while True:
        code, jt, jf, k = program[n]
        n += 1
        kind = code & 7
        if kind == LD:
            if code & 0xE0 == ABS:
                size = SIZES[code & 0x18]
                if k + size > len(packet):
                    return 0
                a = int.from_bytes(packet[k : k + size], "big")
            else:
                assert code & 0xE0 == IMM
                a = k
        elif kind == ALU:
            operand = x if code & 8 else k
            a = {0x50: a & operand, 0x40: a | operand, 0x00: a + operand, 0x10: a - operand}[code & 0xF0] % WORDS
        elif kind == JMP:
            operand = x if code & 8 else k
            test = code & 0xF0
            if test == 0x00:
                n += k
            else:
                holds = {0x10: a == operand, 0x20: a > operand, 0x30: a >= operand, 0x40: bool(a & operand)}[test]
                n += jt if holds else jf
        elif kind == MISC:
            if code & 0xF8:
                a = x
            else:
                x = a
        else:
            assert kind == RET, f"no such instruction: {code:#x}"
            return a if code & 0x18 == 0x10 else k
