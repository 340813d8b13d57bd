/*
 * merge.c - bottom-up merging of a chain of symbols, the common core of both kinds of BPE.
 *
 * The chain is a doubly linked list in an array; merging makes the left symbol longer and unlinks
 * the right one. All adjacent pairs that may merge lie in a binary heap, ordered by (priority,
 * position). A merge changes two pairs; the old ones stay in the heap and are recognized when they
 * come up: both symbols must still be there, be neighbours and have the same number of bytes.
 *
 * That suffices: a symbol's start never moves, so two living neighbours of the same starts and the
 * same total length are the same two strings as when the pair went in.
 *
 * n symbols make at most n - 1 merges and 3 n candidates: O(n log n).
 */
#include "text/tokenizer.h"

/* Room for one more item; NULL when memory is short, and the array stays as it is. */
static void *grow(void *items, size_t n, size_t *room, size_t size) {
    if (n < *room) {
        return items;
    }
    size_t more = *room < 32 ? 64 : 2 * *room;
    void *bigger = memory_resize(items, n, more, size);
    if (bigger != NULL) {
        *room = more;
    }
    return bigger;
}

bool token_list_add(token_list *list, int32_t id) {
    int32_t *ids = grow(list->ids, list->n, &list->room, sizeof *ids);
    if (ids == NULL) {
        return false;
    }
    list->ids = ids;
    ids[list->n++] = id;
    return true;
}

bool merger_add(merger *m, uint32_t start, uint32_t n, int32_t token) {
    merge_symbol *symbols = grow(m->symbols, m->n_symbols, &m->symbol_room, sizeof *symbols);
    if (symbols == NULL) {
        return false;
    }
    m->symbols = symbols;
    uint32_t i = (uint32_t)m->n_symbols++;
    symbols[i] = (merge_symbol){start, n, i == 0 ? MERGE_END : i - 1, MERGE_END, token};
    if (i > 0) {
        symbols[i - 1].next = i;
    }
    return true;
}

/* Moves the candidate at the end of the heap up to its place. */
static void heap_up(merge_candidate *heap, size_t i) {
    merge_candidate c = heap[i];
    while (i > 0 && heap[(i - 1) / 2].key > c.key) {
        heap[i] = heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    heap[i] = c;
}

/* Takes the first candidate out; n >= 1 before. */
static merge_candidate heap_pop(merge_candidate *heap, size_t *n) {
    merge_candidate top = heap[0], last = heap[--*n];
    size_t i = 0;
    for (size_t child; (child = 2 * i + 1) < *n; i = child) {
        if (child + 1 < *n && heap[child + 1].key < heap[child].key) {
            child++;
        }
        if (heap[child].key >= last.key) {
            break;
        }
        heap[i] = heap[child];
    }
    heap[i] = last;
    return top;
}

/* Puts the pair that begins at `left` into the heap if it may merge. False: no memory. */
static bool offer(merger *m, const hepta_tokenizer *t, const uint8_t *text, merge_lookup lookup,
                  uint32_t left) {
    if (left == MERGE_END || m->symbols[left].next == MERGE_END) {
        return true;
    }
    const merge_symbol *l = &m->symbols[left], *r = &m->symbols[l->next];
    uint32_t priority;
    int32_t token;
    m->n_steps++;
    if (!lookup(t, text, l, r, &priority, &token)) {
        return true;
    }
    merge_candidate *heap = grow(m->heap, m->n_heap, &m->heap_room, sizeof *heap);
    if (heap == NULL) {
        return false;
    }
    m->heap = heap;
    heap[m->n_heap] =
        (merge_candidate){(uint64_t)priority << 32 | left, l->next, l->n + r->n, token};
    heap_up(heap, m->n_heap++);
    return true;
}

bool merger_run(merger *m, const hepta_tokenizer *t, const uint8_t *text, merge_lookup lookup) {
    m->n_heap = 0;
    for (uint32_t i = 0; i + 1 < m->n_symbols; i++) {
        if (!offer(m, t, text, lookup, i)) {
            return false;
        }
    }
    while (m->n_heap > 0) {
        merge_candidate c = heap_pop(m->heap, &m->n_heap);
        uint32_t left = (uint32_t)c.key;
        merge_symbol *l = &m->symbols[left], *r = &m->symbols[c.right];
        if (l->n == 0 || r->n == 0 || l->next != c.right || l->n + r->n != c.n) {
            continue; /* out of date */
        }
        l->n = c.n;
        l->token = c.token;
        l->next = r->next;
        if (r->next != MERGE_END) {
            m->symbols[r->next].prev = left;
        }
        r->n = 0;
        if (!offer(m, t, text, lookup, left) || !offer(m, t, text, lookup, l->prev)) {
            return false;
        }
    }
    return true;
}

void merger_free(merger *m) {
    memory_free(m->symbols);
    memory_free(m->heap);
    *m = (merger){0};
}

void encode_work_free(encode_work *w) {
    merger_free(&w->merge);
    memory_free(w->text);
    memory_free(w->code_points);
    memory_free(w->ids.ids);
    *w = (encode_work){0};
}
