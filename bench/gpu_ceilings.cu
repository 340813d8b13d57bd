// gpu_ceilings.cu - what the GPU can do with plain libraries: the int8 and FP16 rates of cuBLAS on a
// large square, and the time that the FP16 matrices of a model take, dequantized: the baseline that
// scripts/test-gpu sets beside Hepta. Lines are "name<TAB>value<TAB>unit".
//
//   nvcc -O3 bench/gpu_ceilings.cu -lcublas -o gpu_ceilings
#include <cublas_v2.h>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cuda_runtime.h>

static void check(int code, const char *what) {
    if (code != 0) {
        fprintf(stderr, "gpu_ceilings: %s: error %d\n", what, code);
        exit(1);
    }
}

static __global__ void fill(uint32_t *p, size_t n, uint32_t mask, uint32_t add) {
    for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
         i += (size_t)gridDim.x * blockDim.x) {
        uint32_t h = (uint32_t)i * 2654435761u;
        h = (h ^ (h >> 15)) * 2246822519u;
        p[i] = ((h ^ (h >> 13)) & mask) + add;
    }
}

struct buffer {
    void *p;
    buffer(size_t n, uint32_t mask, uint32_t add) {
        check(cudaMalloc(&p, n), "cudaMalloc");
        fill<<<1024, 256>>>((uint32_t *)p, n / 4, mask, add);
        check(cudaDeviceSynchronize(), "fill");
    }
    ~buffer() {
        cudaFree(p);
    }
};

// FP16 of about 0.5 to 1, random int8.
static const uint32_t HALF_MASK = 0x03ff03ff, HALF_ADD = 0x38003800, BYTE_MASK = 0xffffffff;

// y (rows, tokens) = w (rows, cols) x (cols, tokens): seconds, the mean of many.
static double time_product(cublasHandle_t handle, bool int8, int rows, int cols, int tokens,
                           int rounds) {
    const size_t size = int8 ? 1 : 2;
    buffer w(size * rows * cols, int8 ? BYTE_MASK : HALF_MASK, int8 ? 0 : HALF_ADD);
    buffer x(size * tokens * cols, int8 ? BYTE_MASK : HALF_MASK, int8 ? 0 : HALF_ADD);
    buffer y((size_t)4 * rows * tokens, 0, 0);
    const int one_i = 1, zero_i = 0;
    const float one_f = 1.0f, zero_f = 0.0f;
    cudaEvent_t begin, end;
    check(cudaEventCreate(&begin), "event");
    check(cudaEventCreate(&end), "event");
    for (int i = -3; i < rounds; i++) {
        if (i == 0) {
            check(cudaEventRecord(begin), "event");
        }
        check(int8 ? cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, rows, tokens, cols, &one_i, w.p,
                                  CUDA_R_8I, cols, x.p, CUDA_R_8I, cols, &zero_i, y.p, CUDA_R_32I,
                                  rows, CUBLAS_COMPUTE_32I, CUBLAS_GEMM_DEFAULT)
                   : cublasGemmEx(handle, CUBLAS_OP_T, CUBLAS_OP_N, rows, tokens, cols, &one_f, w.p,
                                  CUDA_R_16F, cols, x.p, CUDA_R_16F, cols, &zero_f, y.p, CUDA_R_16F,
                                  rows, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
              int8 ? "int8 product" : "FP16 product");
    }
    check(cudaEventRecord(end), "event");
    check(cudaEventSynchronize(end), "event");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "event");
    cudaEventDestroy(begin);
    cudaEventDestroy(end);
    return ms * 1e-3 / rounds;
}

int main() {
    cublasHandle_t handle;
    check(cublasCreate(&handle), "cublasCreate");
    const int n = 8192;
    printf("int8 products of 8192 x 8192 x 8192\t%.6g\tint8 TOPS\n",
           2e-12 * n * n * n / time_product(handle, true, n, n, n, 20));
    fflush(stdout);
    printf("FP16 products of 8192 x 8192 x 8192\t%.6g\tTFLOPS\n",
           2e-12 * n * n * n / time_product(handle, false, n, n, n, 20));
    fflush(stdout);
    const struct {
        int rows, cols;
    } layer[] = {{4096, 4096}, {1024, 4096},  {1024, 4096},  {4096, 4096},
                 {14336, 4096}, {14336, 4096}, {4096, 14336}};
    const int tokens[] = {1, 16, 2048};
    for (int t : tokens) {
        double seconds = time_product(handle, false, 128256, 4096, t == 2048 ? 1 : t, 50);
        for (auto m : layer) {
            seconds += 32 * time_product(handle, false, m.rows, m.cols, t, 50);
        }
        printf("cuBLAS FP16, matrices of llama-3-8b alone, %d tokens\t%.6g\ttokens/s\n", t,
               t / seconds);
        fflush(stdout);
    }
    return 0;
}
