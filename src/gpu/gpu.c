/*
 * gpu.c - finding a backend for GPUs at run time (gpu.h).
 */
#include "gpu/gpu.h"

#include <dlfcn.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* The folder that this code was loaded from; "." if that is not known. */
static void own_folder(char *out, size_t n) {
    Dl_info info;
    snprintf(out, n, ".");
    if (dladdr((void *)(uintptr_t)gpu_backend_load, &info) != 0 && info.dli_fname != NULL) {
        snprintf(out, n, "%s", info.dli_fname);
    }
    char *slash = strrchr(out, '/');
    if (slash == NULL) { /* a program found through $PATH */
        ssize_t k = readlink("/proc/self/exe", out, n - 1);
        out[k > 0 ? k : 0] = '\0';
        slash = strrchr(out, '/');
    }
    if (slash != NULL) {
        *slash = '\0';
    } else {
        snprintf(out, n, ".");
    }
}

/* Loads folder/between/file; NULL if it is not there or cannot be loaded (`why` tells then). */
static void *load_from(const char *folder, const char *between, const char *file, char *why,
                       size_t n) {
    char path[PATH_MAX];
    if (snprintf(path, sizeof path, "%s%s/%s", folder, between, file) >= PATH_MAX ||
        access(path, F_OK) != 0) {
        return NULL;
    }
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == NULL) {
        snprintf(why, n, "%s", dlerror());
    }
    return library;
}

hepta_status gpu_backend_load(const char *name, const gpu_backend **out, hepta_error *err) {
    char file[64], folder[PATH_MAX], why[256] = "";
    snprintf(file, sizeof file, "libhepta-%.32s.so", name);
    const char *given = getenv("HEPTA_GPU_PATH");
    own_folder(folder, sizeof folder);
    void *library = NULL;
    if (given != NULL && given[0] != '\0') {
        library = load_from(given, "", file, why, sizeof why);
    } else if ((library = load_from(folder, "", file, why, sizeof why)) == NULL &&
               (library = load_from(folder, "/../lib", file, why, sizeof why)) == NULL) {
        library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    }
    if (library == NULL) {
        return error_set(err, HEPTA_ERROR_DEVICE, "%s %s%s", file,
                         why[0] != '\0' ? "cannot be loaded: " : "is not there",
                         why[0] != '\0' ? why
                         : strcmp(name, "cuda") == 0
                             ? ": build it with `make CUDA=1`, and leave it beside the program"
                             : "");
    }
    gpu_backend_fn get;
    void *symbol = dlsym(library, GPU_BACKEND_SYMBOL);
    memcpy(&get, &symbol, sizeof get);
    const gpu_backend *b = get != NULL ? get() : NULL;
    if (b == NULL || b->interface != GPU_INTERFACE) {
        return error_set(err, HEPTA_ERROR_DEVICE, "%s belongs to another version of Hepta", file);
    }
    *out = b;
    return HEPTA_OK;
}
