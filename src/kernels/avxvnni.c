/*
 * avxvnni.c - avx2.c with GFNI and AVX-VNNI: x86-64 CPUs without AVX-512 since 2021.
 */
#define AVXVNNI
#include "kernels/avx2.c"
