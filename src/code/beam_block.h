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

/* The costs of all continuations of the paths in f, COUNT each. */
#define BEAM_EXTEND(FLOATS, COUNT)                                                                 \
    for (unsigned k = 0; k < n_paths; k++) {                                                       \
        const unsigned h = hash_old(s, (unsigned)window[k] >> b);                                  \
        const FLOATS target = x + ((FLOATS){0} + ahead[(size_t)k * CODE_BLOCK]);                   \
        const FLOATS d = target - *(const FLOATS *)(values + h * COUNT);                           \
        *(FLOATS *)(cost + k * COUNT) = base[k] + d * d * weight;                                  \
        old_hash[k] = (uint8_t)h;                                                                  \
    }

/* Costs of all continuations of the paths in f by b bits, to s->cost; the least of them. */
BEAM_INLINE float BEAM_PASTE(extend, BEAM_ISA)(const searcher *s, const front *f, int b, unsigned i,
                                               float x, float weight) {
    const float *restrict values = s->values[i & 1], *restrict base = f->cost;
    const float *restrict ahead = f->ahead + i;
    const uint16_t *restrict window = f->window;
    float *restrict cost = s->cost;
    uint8_t *restrict old_hash = s->old_hash;
    const unsigned n_paths = f->n, n = n_paths << b;
    if (b == 4) {
        BEAM_EXTEND(vec16, 16)
    } else if (b == 3) {
        BEAM_EXTEND(vec8, 8)
    } else {
        BEAM_EXTEND(vec4, 4)
    }
    for (unsigned k = n; k % 16 != 0; k++) {
        cost[k] = INFINITY;
    }
#ifdef BEAM_AVX512
    __m512 lane = _mm512_loadu_ps(cost), other = lane;
    unsigned k = 16;
    for (; k + 16 < n; k += 32) {
        lane = _mm512_min_ps(lane, _mm512_loadu_ps(cost + k));
        other = _mm512_min_ps(other, _mm512_loadu_ps(cost + k + 16));
    }
    if (k < n) {
        lane = _mm512_min_ps(lane, _mm512_loadu_ps(cost + k));
    }
    return _mm512_reduce_min_ps(_mm512_min_ps(lane, other));
#else
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
#endif
}

#undef BEAM_EXTEND

BEAM_INLINE unsigned BEAM_PASTE(count, BEAM_ISA)(const float *cost, unsigned n, float limit) {
#ifdef BEAM_AVX512
    const __m512i one = _mm512_set1_epi32(1);
    const __m512 most = _mm512_set1_ps(limit);
    __m512i a = _mm512_setzero_si512(), c = a;
    unsigned k = 0;
    for (; k + 16 < n; k += 32) {
        a = _mm512_mask_add_epi32(
            a, _mm512_cmp_ps_mask(_mm512_loadu_ps(cost + k), most, _CMP_LE_OQ), a, one);
        c = _mm512_mask_add_epi32(
            c, _mm512_cmp_ps_mask(_mm512_loadu_ps(cost + k + 16), most, _CMP_LE_OQ), c, one);
    }
    if (k < n) {
        a = _mm512_mask_add_epi32(
            a, _mm512_cmp_ps_mask(_mm512_loadu_ps(cost + k), most, _CMP_LE_OQ), a, one);
    }
    return (unsigned)_mm512_reduce_add_epi32(_mm512_add_epi32(a, c));
#else
    int32x16 lane = {0};
    for (unsigned k = 0; k < n; k += 16) {
        lane -= *(const vec16 *)(cost + k) <= limit;
    }
    int32_t sum = 0;
    for (unsigned l = 0; l < 16; l++) {
        sum += lane[l];
    }
    return (unsigned)sum;
#endif
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
    return picked < s->capacity ? picked : (unsigned)s->capacity;
}

/* Weight i of the block at `at`: the paths of f go on as those of g. */
BEAM_INLINE void BEAM_PASTE(step, BEAM_ISA)(searcher *s, beam *w, const front *f, front *g, int b,
                                            size_t at, unsigned i, float x, float plain,
                                            float weight, const float *near) {
    const unsigned mask = (1u << b) - 1;
    const float least = BEAM_PASTE(extend, BEAM_ISA)(s, f, b, i, x, weight);
    const unsigned n = f->n << b, n_full = (n + 15) / 16 * 16;
    const float limit = n > s->width ? BEAM_PASTE(find_limit, BEAM_ISA)(s, w, n_full, least)
                                     : FLT_MAX; /* all but the dropped */
    const unsigned n_picked = BEAM_PASTE(pick, BEAM_ISA)(s, n_full, limit);

    /* Of paths that meet in a state the cheapest goes on. Few do: that is the only branch. */
    const int next_width = s->table->width[1 - (i & 1)];
    const uint32_t *restrict picked = s->picked;
    const uint16_t *restrict old_window = f->window;
    const float *restrict costs = s->cost;
    uint16_t *restrict choice = choices_at(s, w, at, i), *restrict new_window = g->window;
    uint16_t *restrict slot = s->slot;
    float *restrict new_cost = g->cost;
    unsigned n_next = 0;
    for (unsigned j = 0; j < n_picked; j++) {
        const unsigned k = picked[j];
        const unsigned window = (unsigned)old_window[k >> b] >> b | (k & mask) << (CODE_WINDOW - b);
        const unsigned state = window >> next_width;
        const float cost = costs[k] - least;
        unsigned to = slot[state];
        if ((to < n_next) & ((unsigned)new_window[to] >> next_width == state)) {
            if (new_cost[to] <= cost) {
                continue;
            }
        } else {
            to = n_next++;
            slot[state] = (uint16_t)to;
        }
        new_cost[to] = cost;
        new_window[to] = (uint16_t)window;
        choice[to] = (uint16_t)k;
    }
    g->n = n_next;
    const float *restrict values = s->values[i & 1], *restrict before = f->ahead;
    const uint8_t *restrict old_hash = s->old_hash;
    float *restrict error = s->error + i * s->capacity, *restrict after = g->ahead;
    const vec16 ahead = *(const vec16 *)near;
    for (unsigned j = 0; j < n_next; j++) {
        const unsigned k = choice[j], from = k >> b;
        const float e = plain - values[((unsigned)old_hash[from] << b) + (k & mask)];
        error[j] = e;
        *(vec16 *)(after + (size_t)j * CODE_BLOCK) =
            *(const vec16 *)(before + (size_t)from * CODE_BLOCK) + ahead * e;
    }
}

/*
 * After the block at `at`: where its paths began, and what their errors in it give to the `lag`
 * blocks ahead, of which the first is next.
 */
BEAM_INLINE void BEAM_PASTE(settle, BEAM_ISA)(searcher *s, beam *w, size_t at, const float *near,
                                              unsigned lag) {
    const size_t later = (size_t)(lag - 1) * CODE_BLOCK, capacity = s->capacity;
    const int even = s->table->width[0], odd = s->table->width[1];
    const uint16_t *restrict choice = choices_at(s, w, at, 0);
    const float *restrict errors = s->error;
    const front *f = &w->front;
    for (unsigned j = 0; j < f->n; j++) {
        float error[CODE_BLOCK];
        size_t path = j;
        for (unsigned i = CODE_BLOCK; i > 0; i -= 2) {
            error[i - 1] = errors[(i - 1) * capacity + path];
            path = (size_t)choice[(i - 1) * capacity + path] >> odd;
            error[i - 2] = errors[(i - 2) * capacity + path];
            path = (size_t)choice[(i - 2) * capacity + path] >> even;
        }
        s->origin[j] = w->origin[path];
        vec16 sum[CODE_LAG_MAX];
        for (unsigned l = 0; l < lag; l++) {
            sum[l] = l + 1 < lag ? *(const vec16 *)(w->later + path * later + l * CODE_BLOCK)
                                 : (vec16){0};
        }
        for (unsigned i = 0; i < CODE_BLOCK; i++) {
            const float *ahead = near + (size_t)(i * (lag + 1) + 1) * CODE_BLOCK;
            for (unsigned l = 0; l < lag; l++) {
                sum[l] += *(const vec16 *)(ahead + l * CODE_BLOCK) * error[i];
            }
        }
        *(vec16 *)(f->ahead + (size_t)j * CODE_BLOCK) = sum[0];
        for (unsigned l = 1; l < lag; l++) {
            *(vec16 *)(s->later + j * later + (l - 1) * CODE_BLOCK) = sum[l];
        }
    }
}

/* Weights [at, at + 16) of a row: x with feedback from far, plain without, both in units of v. */
BEAM_TARGET static void BEAM_PASTE(block, BEAM_ISA)(searcher *s, beam *w, size_t at, const float *x,
                                                    const float *plain, const float *weight,
                                                    const float *near) {
    for (unsigned i = 0; i < CODE_BLOCK; i++) {
        const front *f = i & 1 ? &s->odd : &w->front;
        front *g = i & 1 ? &w->front : &s->odd;
        const float *ahead = near + (size_t)i * (s->lag + 1) * CODE_BLOCK;
        switch (s->table->width[i & 1]) {
        case 2:
            BEAM_PASTE(step, BEAM_ISA)(s, w, f, g, 2, at, i, x[i], plain[i], weight[i], ahead);
            break;
        case 3:
            BEAM_PASTE(step, BEAM_ISA)(s, w, f, g, 3, at, i, x[i], plain[i], weight[i], ahead);
            break;
        default:
            BEAM_PASTE(step, BEAM_ISA)(s, w, f, g, 4, at, i, x[i], plain[i], weight[i], ahead);
            break;
        }
    }
    switch (s->lag) {
    case 1:
        BEAM_PASTE(settle, BEAM_ISA)(s, w, at, near, 1);
        break;
    case 2:
        BEAM_PASTE(settle, BEAM_ISA)(s, w, at, near, 2);
        break;
    case 3:
        BEAM_PASTE(settle, BEAM_ISA)(s, w, at, near, 3);
        break;
    default:
        BEAM_PASTE(settle, BEAM_ISA)(s, w, at, near, CODE_LAG_MAX);
        break;
    }
}

#undef BEAM_INLINE
#undef BEAM_PASTE
#undef BEAM_PASTE_
#undef BEAM_ISA
#undef BEAM_TARGET
#undef BEAM_AVX512
