/*
 * threads.c - how many threads to use when nobody says: physical cores this process may run on,
 * within its cgroup's CPU quota (hyper-threads share the vector units that the kernels fill).
 */
#include "base/base.h"

#include <sched.h>
#include <stdio.h>
#include <string.h>

enum { MAX_CPU = 4096 };

/* First line of a small system file; false if it cannot be read. */
static bool read_line(const char *path, char *line, int size) {
    FILE *f = fopen(path, "re");
    bool ok = f != NULL && fgets(line, size, f) != NULL;
    if (f != NULL) {
        fclose(f);
    }
    return ok;
}

/* Whole CPUs granted by the cgroup (v2, then v1), at least 1; a large number if unlimited. */
static int quota_cpus(void) {
    char line[128];
    long long quota = -1, period = 0;
    if (read_line("/sys/fs/cgroup/cpu.max", line, sizeof line)) {
        if (sscanf(line, "%lld %lld", &quota, &period) != 2) { /* "max 100000" */
            quota = -1;
        }
    } else if (read_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", line, sizeof line) &&
               sscanf(line, "%lld", &quota) == 1 &&
               read_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us", line, sizeof line)) {
        if (sscanf(line, "%lld", &period) != 1) {
            quota = -1;
        }
    }
    if (quota <= 0 || period <= 0) {
        return MAX_CPU;
    }
    long long cpus = (quota + period - 1) / period;
    return cpus < 1 ? 1 : cpus > MAX_CPU ? MAX_CPU : (int)cpus;
}

int threads_default(void) {
    cpu_set_t *set = CPU_ALLOC(MAX_CPU);
    if (set == NULL) {
        return 1;
    }
    size_t size = CPU_ALLOC_SIZE(MAX_CPU);
    int cores = 0;
    if (sched_getaffinity(0, size, set) == 0) {
        for (int cpu = 0; cpu < MAX_CPU; cpu++) {
            if (!CPU_ISSET_S((size_t)cpu, size, set)) {
                continue;
            }
            /* Count a core at the first of its hyper-threads that we may use. */
            char path[96], line[128];
            snprintf(path, sizeof path,
                     "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
            int first = cpu;
            if (read_line(path, line, sizeof line)) {
                (void)sscanf(line, "%d", &first);
            }
            cores += first == cpu || first < 0 || first >= MAX_CPU ||
                     !CPU_ISSET_S((size_t)first, size, set);
        }
    }
    CPU_FREE(set);
    int quota = quota_cpus();
    cores = cores < quota ? cores : quota;
    return cores < 1 ? 1 : cores;
}
