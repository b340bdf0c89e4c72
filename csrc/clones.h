// One body, three instruction sets, chosen when the library loads. Elsewhere: the one the compiler
// targets (also with G2RPO_ONE_VARIANT, by which tests compare the bits of all three).
#pragma once

#if !defined(G2RPO_ONE_VARIANT) && defined(__x86_64__) && defined(__linux__) && \
    defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define G2RPO_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define G2RPO_HAS_CLONES 1
#else
#define G2RPO_CLONES
#define G2RPO_HAS_CLONES 0
#endif
