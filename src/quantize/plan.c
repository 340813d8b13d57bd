/*
 * plan.c - a greedy bit allocation.
 *
 * A tensor of n weights coded at R bits per weight has a relative squared error near 4^-R, and
 * adds to the error of the model in proportion to it, whatever its size: each linear layer feeds
 * the same residual stream. So the error saved per bit spent is  c * (4^-R - 4^-(R + 1/2)) / (n/2)
 * with c a factor per kind of tensor, and small tensors deserve more bits than big ones.
 * Starting from the lowest rate allowed, the tensor with the best saving gets another half bit
 * until nothing fits. Rates stay within one bit of the target where the budget allows.
 *
 * Everything is exact integer or correctly rounded arithmetic in a fixed order: the same plan on
 * every machine. The measurements behind the factors: docs/QUALITY.md.
 */
#include "quantize/plan.h"

#include <string.h>

bool plan_is_packed(const tensor *t) {
    return t->n_dims == 2;
}

static bool ends_with(const char *s, const char *end) {
    size_t n = strlen(s), m = strlen(end);
    return n >= m && memcmp(s + n - m, end, m) == 0;
}

/*
 * Weight of a tensor's relative error in the error of the logits, against a gate's: measured as the
 * KL divergence at 3 bits, one kind at a time, on the bundled model (docs/QUALITY.md). The matrix
 * that makes the logits stands out; `tied` when the embedding is that matrix.
 */
static double sensitivity(const char *name, bool tied) {
    static const struct {
        const char *end;
        double factor;
    } kinds[] = {
        {".attn_q.weight", 0.5},      {".attn_k.weight", 0.5},   {".attn_v.weight", 2},
        {".attn_output.weight", 1.5}, {".ffn_down.weight", 1.5},
    };
    if (strcmp(name, "output.weight") == 0 || (tied && strcmp(name, "token_embd.weight") == 0)) {
        return 50;
    }
    if (strcmp(name, "token_embd.weight") == 0) {
        return 8;
    }
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (ends_with(name, kinds[i].end)) {
            return kinds[i].factor;
        }
    }
    return 1;
}

static uint64_t packed_bytes(const tensor *t, uint32_t half_bits) {
    uint64_t n = 0;
    (void)tensor_packed_bytes(half_bits, t->ne[1], t->ne[0],
                              &n); /* shapes were checked at opening */
    return n;
}

/* Error saved per byte when t goes from `half_bits` to half_bits + 1. */
static double saving(const tensor *t, uint32_t half_bits, bool tied) {
    double error = 1;
    for (uint32_t i = 0; i < half_bits; i++) {
        error *= 0.5; /* 4^-(half_bits / 2) */
    }
    uint64_t bytes = packed_bytes(t, half_bits + 1) - packed_bytes(t, half_bits);
    return sensitivity(t->name, tied) * (error * 0.5) / (double)bytes;
}

hepta_status plan_rates(const tensor *tensors, size_t n, double bits, uint32_t *half_bits,
                        hepta_error *err) {
    uint32_t target = bits > 0 && bits <= 8 ? (uint32_t)(bits * 2) : 0;
    if (bits * 2 != (double)target ||
        (target != HALF_BITS_INT8 && (target < HALF_BITS_MIN || target > HALF_BITS_MAX))) {
        return error_set(err, HEPTA_ERROR_ARGUMENT,
                         "%g bits per weight: expected 2, 2.5, 3, 3.5, 4 or 8", bits);
    }
    bool on_top = target == HALF_BITS_MIN || target == HALF_BITS_INT8;
    uint32_t low = target > HALF_BITS_MIN + 2 ? target - 2 : HALF_BITS_MIN;
    uint32_t high = target + 2 < HALF_BITS_MAX ? target + 2 : HALF_BITS_MAX;
    uint64_t used = 0, budget = 0;
    bool tied = true;
    for (size_t i = 0; i < n; i++) {
        tied = tied && strcmp(tensors[i].name, "output.weight") != 0;
    }
    for (;; low--) {
        uint64_t n_weights = 0;
        used = 0;
        for (size_t i = 0; i < n; i++) {
            const tensor *t = &tensors[i];
            n_weights += tensor_n_weights(t);
            half_bits[i] = plan_is_packed(t) ? (on_top ? target : low) : 0;
            used += half_bits[i] != 0 ? packed_bytes(t, half_bits[i]) : 4 * tensor_n_weights(t);
        }
        if (on_top) {
            return HEPTA_OK;
        }
        budget = (uint64_t)((double)n_weights * bits / 8);
        if (used <= budget) {
            break;
        }
        if (low == HALF_BITS_MIN) {
            return error_set(err, HEPTA_ERROR_UNSUPPORTED,
                             "the tensors are too small for %g bits per weight: at the lowest rate "
                             "they take %.3f with their scales; choose more bits",
                             bits, (double)used * 8 / (double)n_weights);
        }
    }
    for (;;) {
        size_t best = n;
        double best_saving = 0;
        for (size_t i = 0; i < n; i++) {
            if (half_bits[i] == 0 || half_bits[i] >= high) {
                continue;
            }
            uint64_t more = packed_bytes(&tensors[i], half_bits[i] + 1) -
                            packed_bytes(&tensors[i], half_bits[i]);
            double s = saving(&tensors[i], half_bits[i], tied);
            if (used + more <= budget && s > best_saving) {
                best = i;
                best_saving = s;
            }
        }
        if (best == n) {
            return HEPTA_OK;
        }
        used -= packed_bytes(&tensors[best], half_bits[best]);
        used += packed_bytes(&tensors[best], ++half_bits[best]);
    }
}
