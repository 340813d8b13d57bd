/*
 * backend.cc - a backend of gpu.h: the same source for NVIDIA GPUs (nvcc), AMD's (hipcc), and, for
 * tests, an emulated one (any C++17 compiler). See platform.h.
 */
#include "gpu/timing.h"

/* ---- What the memory of the device gives ------------------------------- */

typedef struct sweep_parameters {
    const words4 *from;
    words4 *to; /* NULL: only read */
    uint32_t *sink;
    uint64_t n;
    uint32_t n_blocks;
} sweep_parameters;

enum { SWEEP_THREADS = 256, SWEEP_AHEAD = 4 };

/* Reads, or copies, n words of 16 bytes. */
GPU_KERNEL_OF(SWEEP_THREADS, 1) sweep(sweep_parameters p) {
    const uint64_t step = (uint64_t)p.n_blocks * SWEEP_THREADS;
    THREADS_ALONE(t) {
        uint32_t all = 0;
        uint64_t i = (uint64_t)BLOCK_X * SWEEP_THREADS + t;
        for (; i + (SWEEP_AHEAD - 1) * step < p.n; i += SWEEP_AHEAD * step) {
            words4 w[SWEEP_AHEAD];
            UNROLL
            for (int k = 0; k < SWEEP_AHEAD; k++) {
                w[k] = load_words4(p.from + i + (uint64_t)k * step);
            }
            UNROLL
            for (int k = 0; k < SWEEP_AHEAD; k++) {
                if (p.to != NULL) {
                    p.to[i + (uint64_t)k * step] = w[k];
                }
                all ^= w[k].v[0] ^ w[k].v[1] ^ w[k].v[2] ^ w[k].v[3];
            }
        }
        if (all == 0x5eed5eedu) { /* so that the loads are not left out */
            p.sink[0] = all;
        }
    }
}

/* Seconds of one sweep, the best of some. */
static hepta_status time_sweep(const sweep_parameters &p, double *seconds, hepta_error *err) {
    dev_stream s;
    TRY(dev_stream_create(&s, err));
    *seconds = 1e30;
    hepta_status status = HEPTA_OK;
    for (int run = 0; run < 6 && status == HEPTA_OK; run++) {
        const double started = host_seconds();
        for (int k = 0; k < 10 && status == HEPTA_OK; k++) {
            status = launch(s, grid{p.n_blocks, 1, 1}, SWEEP_THREADS, 0, sweep, p, err);
        }
        status = status == HEPTA_OK ? dev_wait(s, err) : status;
        const double took = (host_seconds() - started) / 10;
        *seconds = took < *seconds ? took : *seconds;
    }
    dev_stream_free(s);
    return status;
}

static hepta_status bandwidth(int number, double *read, double *copied, hepta_error *err) {
    gpu_device_info d;
    dev_blocks blocks = {};
    sweep_parameters p = {};
    void *from, *to, *sink;
    TRY(dev_open(number, &d, err));
    uint64_t bytes = d.memory_free / 8;
    bytes = bytes < GPU_SWEEP_BYTES ? bytes : GPU_SWEEP_BYTES;
    bytes = bytes / 4096 * 4096;
    hepta_status status = blocks_add(&blocks, bytes, &from, err);
    status = status == HEPTA_OK ? blocks_add(&blocks, bytes, &to, err) : status;
    status = status == HEPTA_OK ? blocks_add(&blocks, 64, &sink, err) : status;
    double seconds = 0.0;
    if (status == HEPTA_OK) {
        p.from = (const words4 *)from, p.sink = (uint32_t *)sink, p.n = bytes / 16;
        p.n_blocks = (uint32_t)d.processors * 16;
        status = time_sweep(p, &seconds, err);
        *read = (double)bytes / seconds;
    }
    if (status == HEPTA_OK) {
        p.to = (words4 *)to;
        status = time_sweep(p, &seconds, err);
        *copied = 2.0 * (double)bytes / seconds;
    }
    blocks_free(&blocks);
    return status;
}

/* ---- The table --------------------------------------------------------- */

static const gpu_checks checks = {check_matmul,    check_embed, check_angles, check_prepare,
                                  check_attention, check_time,  tile_rate};

static const gpu_backend backend = {
    GPU_INTERFACE,  GPU_BACKEND_NAME, dev_open,      model_load, model_free, model_bytes,
    session_create, session_free,     session_bytes, forward,    bandwidth,  &checks,
};

extern "C" __attribute__((visibility("default"))) const gpu_backend *hepta_gpu_backend(void) {
    return &backend;
}
