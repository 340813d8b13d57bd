/*
 * beam_block.h - sixteen weights of one row in the beam search of beam.c, for one instruction set.
 *
 * No include guard: beam.c includes it once per set, with
 *     BEAM_ISA      suffix of the functions
 *     BEAM_TARGET   function attributes
 *     BEAM_AVX512   defined where candidates are picked by compression
 * The arithmetic is the same in all of them: every float operation concerns one item alone, and
 * minima and counts have no order.
 */

#define BEAM_PASTE_(a, b) a##_##b
#define BEAM_PASTE(a, b) BEAM_PASTE_(a, b)
#define BEAM_INLINE BEAM_TARGET static inline __attribute__((always_inline))

/* Costs of all continuations of the paths in f by b bits, to s->cost; the least of them. */
BEAM_INLINE float BEAM_PASTE(extend, BEAM_ISA)(const searcher *s, const front *f, int b,
                                               unsigned parity, float x, float weight, unsigned i) {
    const unsigned n_symbols = 1u << b;
    const float *restrict values = s->values[parity];
    float *restrict cost = s->cost;
    const unsigned n_paths = f->n;
    for (unsigned k = 0; k < n_paths; k++) {
        const unsigned h = hash_old(s, (unsigned)f->window[k] >> b);
        const float *restrict v = values + h * n_symbols;
        const float base = f->cost[k];
        const float target = f->ahead != NULL ? x + f->ahead[k * s->n_ahead + i] : x;
        s->old_hash[k] = (uint8_t)h;
        float *restrict out = cost + k * n_symbols;
        if (b == 4) {
            const vec16 d = target - *(const vec16 *)v;
            *(vec16 *)out = base + d * d * weight;
        } else if (b == 3) {
            const vec8 d = target - *(const vec8 *)v;
            *(vec8 *)out = base + d * d * weight;
        } else {
            const vec4 d = target - *(const vec4 *)v;
            *(vec4 *)out = base + d * d * weight;
        }
    }
    const unsigned n = n_paths << b;
    for (unsigned k = n; k % 16 != 0; k++) {
        cost[k] = INFINITY;
    }
    /* Costs are not negative: their order is that of their bits. */
    int32x16 lane = *(const int32x16 *)cost;
    for (unsigned k = 16; k < n; k += 16) {
        const int32x16 c = *(const int32x16 *)(cost + k), less = c < lane;
        lane = (c & less) | (lane & ~less);
    }
    int32_t least = lane[0];
    for (unsigned l = 1; l < 16; l++) {
        least = lane[l] < least ? lane[l] : least;
    }
    float result;
    memcpy(&result, &least, sizeof result);
    return result;
}

BEAM_INLINE unsigned BEAM_PASTE(count, BEAM_ISA)(const float *cost, unsigned n, float limit) {
    int32x16 lane = {0};
    for (unsigned k = 0; k < n; k += 16) {
        lane -= *(const vec16 *)(cost + k) <= limit;
    }
    int32_t sum = 0;
    for (unsigned l = 0; l < 16; l++) {
        sum += lane[l];
    }
    return (unsigned)sum;
}

/* A cost that between 7/8 and 9/8 of the beam's width of n candidates do not exceed. */
BEAM_INLINE float BEAM_PASTE(find_limit, BEAM_ISA)(const searcher *s, beam *w, unsigned n,
                                                   float least) {
    enum { TRIES = 12 };
    const unsigned width = s->width;
    float low = 0, high = INFINITY, reach = w->reach;
    for (int i = 0; i < TRIES; i++) {
        const unsigned found = BEAM_PASTE(count, BEAM_ISA)(s->cost, n, least + reach);
        if (found > width + width / 8) {
            high = reach;
        } else if (found < width - width / 8) {
            low = reach;
        } else {
            break;
        }
        const float ratio = (float)width / (float)found; /* found >= 1: the least */
        float next = reach * (ratio < 0.25f ? 0.25f : ratio > 4.0f ? 4.0f : ratio);
        if (!(next > low && next < high)) {
            next = high < INFINITY ? (low + high) * 0.5f : low * 2.0f;
        }
        reach = next;
    }
    w->reach = reach;
    return least + reach;
}

/* Numbers of the candidates that cost at most `limit`, the first s->capacity of them. */
BEAM_INLINE unsigned BEAM_PASTE(pick, BEAM_ISA)(const searcher *s, unsigned n, float limit) {
    unsigned picked = 0;
#ifdef BEAM_AVX512
    __m512i number = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (unsigned k = 0; k < n && picked < s->capacity; k += 16) {
        const __mmask16 m =
            _mm512_cmp_ps_mask(_mm512_loadu_ps(s->cost + k), _mm512_set1_ps(limit), _CMP_LE_OQ);
        _mm512_storeu_si512(s->picked + picked, _mm512_maskz_compress_epi32(m, number));
        picked += (unsigned)__builtin_popcount(m);
        number = _mm512_add_epi32(number, _mm512_set1_epi32(16));
    }
#else
    for (unsigned k = 0; k < n && picked < s->capacity; k++) {
        s->picked[picked] = k;
        picked += s->cost[k] <= limit;
    }
#endif
    return picked < s->capacity ? picked : s->capacity;
}

/* One weight: the paths of f go on as those of g. */
BEAM_INLINE void BEAM_PASTE(step, BEAM_ISA)(searcher *s, beam *w, int b, size_t at, float x,
                                            float plain, float weight, const float *near) {
    const unsigned i = at % CODE_BLOCK, parity = i & 1, n_symbols = 1u << b;
    const front *f = &w->front[parity];
    front *g = &w->front[1 - parity];
    const float least = BEAM_PASTE(extend, BEAM_ISA)(s, f, b, parity, x, weight, i);
    const unsigned n = f->n << b, n_full = (n + 15) / 16 * 16;
    const float limit = n > s->width ? BEAM_PASTE(find_limit, BEAM_ISA)(s, w, n_full, least)
                                     : FLT_MAX; /* all but the dropped */
    const unsigned n_picked = BEAM_PASTE(pick, BEAM_ISA)(s, n_full, limit);

    /* Of paths that meet in a state the cheapest goes on. */
    const int next_width = s->table->width[1 - parity];
    uint8_t *symbol = w->symbol + (at % s->history) * s->capacity;
    uint16_t *parent = w->parent + (at % s->history) * s->capacity;
    if (++s->epoch == 1u << 16) {
        memset(s->slot, 0, sizeof s->slot);
        s->epoch = 1;
    }
    unsigned n_next = 0;
    for (unsigned j = 0; j < n_picked; j++) {
        const unsigned k = s->picked[j], from = k >> b, a = k & (n_symbols - 1);
        const unsigned window = (unsigned)f->window[from] >> b | a << (CODE_WINDOW - b);
        uint32_t *slot = &s->slot[window >> next_width];
        const bool met = *slot >> 16 == s->epoch;
        const unsigned to = met ? *slot & 0xffff : n_next;
        const float cost = s->cost[k] - least;
        if (met && g->cost[to] <= cost) {
            continue;
        }
        *slot = s->epoch << 16 | to;
        n_next += !met;
        g->cost[to] = cost;
        g->window[to] = (uint16_t)window;
        symbol[to] = (uint8_t)a;
        parent[to] = (uint16_t)from;
    }
    g->n = n_next;
    for (unsigned j = 0; j < n_next; j++) {
        g->origin[j] = f->origin[parent[j]];
    }
    if (near == NULL) {
        return;
    }
    for (unsigned j = 0; j < n_next; j++) {
        const unsigned from = parent[j], n_ahead = s->n_ahead;
        const float e = plain - s->values[parity][s->old_hash[from] * n_symbols + symbol[j]];
        const float *restrict in = f->ahead + (size_t)from * n_ahead;
        float *restrict out = g->ahead + (size_t)j * n_ahead;
        for (unsigned l = 0; l < n_ahead; l += 16) {
            *(vec16 *)(out + l) = *(const vec16 *)(in + l) + *(const vec16 *)(near + l) * e;
        }
    }
}

/* Weights [at, at + 16) of a row: x with feedback from far, plain without, both in units of v. */
BEAM_TARGET static void BEAM_PASTE(block, BEAM_ISA)(searcher *s, beam *w, size_t at, const float *x,
                                                    const float *plain, const float *weight,
                                                    const float *near) {
    for (unsigned i = 0; i < CODE_BLOCK; i++) {
        const float *m = near != NULL ? near + i * s->n_ahead : NULL;
        switch (s->table->width[i & 1]) {
        case 2:
            BEAM_PASTE(step, BEAM_ISA)(s, w, 2, at + i, x[i], plain[i], weight[i], m);
            break;
        case 3:
            BEAM_PASTE(step, BEAM_ISA)(s, w, 3, at + i, x[i], plain[i], weight[i], m);
            break;
        default:
            BEAM_PASTE(step, BEAM_ISA)(s, w, 4, at + i, x[i], plain[i], weight[i], m);
            break;
        }
    }
}

#undef BEAM_INLINE
#undef BEAM_PASTE
#undef BEAM_PASTE_
#undef BEAM_ISA
#undef BEAM_TARGET
#undef BEAM_AVX512
