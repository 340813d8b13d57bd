# Hepta. Targets: all (default), demo, test, test-gpu, check, bench, compare, quality, install, engine, format, clean.
#
# Variables: CC, CFLAGS, LDFLAGS, BUILD (output folder), PREFIX, DESTDIR,
# ENGINE_ONLY=1 (libraries without text and JSON: only a C compiler, make, libc and OpenMP),
# WERROR=1 (warnings are errors, as in `make check`), SANITIZE=address,undefined or SANITIZE=thread,
# CUDA=1 (also the backend for NVIDIA GPUs: nvcc; NVCC, CUDA_ARCHS), HIP=1 (for AMD's: hipcc, HIPCC).

MAKEFLAGS += --no-builtin-rules
VERSION := $(shell sed -n 's/^.define HEPTA_VERSION_M[AI][JN]OR \([0-9]*\)/\1/p;s/^.define HEPTA_VERSION_PATCH \([0-9]*\)/\1/p' include/hepta.h | paste -sd.)
SOVERSION := $(firstword $(subst ., ,$(VERSION)))
ifeq ($(origin CC),default)
CC := gcc
endif
BUILD ?= build
PREFIX ?= /usr/local
CFLAGS ?= -O3 -g
ARCH := $(shell $(CC) -dumpmachine | cut -d- -f1)

# The numeric contract: every float operation as written, none fused, none reordered.
NUMERIC := -ffp-contract=off -fno-fast-math -fno-math-errno -fexcess-precision=standard
ifneq (,$(findstring clang,$(shell $(CC) --version)))
NUMERIC := $(filter-out -fexcess-precision=standard,$(NUMERIC))
endif
WARNINGS := -Wall -Wextra -Wconversion -Wshadow -Wstrict-prototypes
FLAGS := -std=c11 -D_GNU_SOURCE -Iinclude -Isrc $(WARNINGS) $(NUMERIC) -fopenmp -fPIC \
	-fvisibility=hidden -MMD -MP
LIBS := -lm -ldl
ifdef WERROR
FLAGS += -Werror
endif
ifdef SANITIZE
FLAGS += -fsanitize=$(SANITIZE) -fno-sanitize-recover=all -fno-omit-frame-pointer
LINK_FLAGS := -fsanitize=$(SANITIZE)
endif

MODULES := base code format gpu kernels model quantize
PACKAGES :=
ifdef ENGINE_ONLY
FLAGS += -DHEPTA_ENGINE_ONLY
else
MODULES += text
PACKAGES := jansson libutf8proc
ifneq ($(shell pkg-config --exists $(PACKAGES) 2>/dev/null && echo yes),yes)
ifneq ($(filter-out engine demo test deps format clean uninstall check ci,$(or $(MAKECMDGOALS),all)),)
$(error Missing libraries: $(PACKAGES). Run scripts/deps, or build the engine alone with `make engine`)
endif
endif
FLAGS += $(shell pkg-config --cflags $(PACKAGES) 2>/dev/null)
LIBS += $(shell pkg-config --libs $(PACKAGES) 2>/dev/null)
endif

LIB_SOURCES := $(sort $(wildcard $(MODULES:%=src/%/*.c)))
LIB_OBJECTS := $(LIB_SOURCES:%.c=$(BUILD)/%.o)
CLI_OBJECTS := $(patsubst %.c,$(BUILD)/%.o,$(sort $(wildcard src/cli/*.c)))
TEST_OBJECTS := $(patsubst %.c,$(BUILD)/%.o,tests/main.c tests/amx_model.c $(sort $(wildcard tests/test_*.c)))

# Where the bundled model is looked for last; first come folders beside the program.
$(BUILD)/src/cli/util.o: FLAGS += -DHEPTA_DATA_DIR='"$(PREFIX)/share/hepta"'

ifeq ($(ARCH),x86_64)
$(BUILD)/src/kernels/avx2.o: FLAGS += -mavx2 -mf16c
$(BUILD)/src/kernels/avxvnni.o: FLAGS += -mavx2 -mf16c -mgfni -mavxvnni
AVX512_OBJECTS := $(patsubst %,$(BUILD)/%.o,src/kernels/avx512 src/kernels/amx tests/amx_model)
$(AVX512_OBJECTS): FLAGS += -mavx2 -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512dq \
	-mavx512vnni -mavx512vbmi -mavx512vbmi2 -mgfni
endif
ifeq ($(ARCH),aarch64)
$(BUILD)/src/kernels/neon_dotprod.o: FLAGS += -march=armv8.2-a+dotprod
$(BUILD)/src/kernels/neon_i8mm.o: FLAGS += -march=armv8.2-a+dotprod+i8mm+sha3
endif

.PHONY: all engine demo test check bench compare quality install uninstall deps format clean ci
all: $(BUILD)/libhepta.a $(BUILD)/libhepta.so $(BUILD)/hepta

engine: # the libraries alone, with no dependency beyond libc and OpenMP
	$(MAKE) ENGINE_ONLY=1 BUILD=$(BUILD)-engine $(BUILD)-engine/libhepta.a $(BUILD)-engine/libhepta.so

$(BUILD)/%.o: %.c Makefile
	@mkdir -p $(@D)
	$(CC) $(FLAGS) $(CFLAGS) -c $< -o $@

# GPU backends (docs/GPU.md): the same source for an emulated device, which the tests use.
GPU_SOURCES := $(wildcard src/gpu/*.h src/gpu/*.cc) src/kernels/kernels.h src/kernels/math.h \
	src/kernels/trig.h src/code/code.h include/hepta.h
GPU_FLAGS := $(filter-out -std=c11 -Wstrict-prototypes -fopenmp -MMD -MP -DHEPTA_ENGINE_ONLY \
	-fexcess-precision=standard,$(FLAGS)) -std=c++17 -fno-exceptions -fno-rtti
CXX := g++
NVCC ?= nvcc
HIPCC ?= hipcc
CUDA_ARCHS ?= 75 80 86 89 90
HIP_ARCHS ?= gfx906 gfx90a gfx1030
CUDA_FLAGS := -std=c++17 -O3 -Iinclude -Isrc --fmad=false --prec-div=true --prec-sqrt=true --ftz=false \
	-diag-suppress 177 --threads 0 -cudart static -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off \
	$(foreach a,$(CUDA_ARCHS),-gencode arch=compute_$a,code=sm_$a) \
	-gencode arch=compute_$(lastword $(CUDA_ARCHS)),code=compute_$(lastword $(CUDA_ARCHS))
HIP_FLAGS := -std=c++17 -O3 -Iinclude -Isrc -ffp-contract=off -fno-fast-math -fPIC -fvisibility=hidden \
	-fhip-fp32-correctly-rounded-divide-sqrt $(addprefix --offload-arch=,$(HIP_ARCHS))

ifdef CUDA
all: $(BUILD)/libhepta-cuda.so
endif
ifdef HIP
all: $(BUILD)/libhepta-hip.so
endif

$(BUILD)/libhepta-cuda.so: $(GPU_SOURCES) Makefile
	@mkdir -p $(@D)
	$(NVCC) $(CUDA_FLAGS) -x cu src/gpu/backend.cc -shared -o $@

$(BUILD)/libhepta-hip.so: $(GPU_SOURCES) Makefile
	@mkdir -p $(@D)
	$(HIPCC) $(HIP_FLAGS) -x hip src/gpu/backend.cc -shared -o $@

$(BUILD)/libhepta-emulated.so: $(GPU_SOURCES) Makefile
	@mkdir -p $(@D)
	$(CXX) $(GPU_FLAGS) $(CFLAGS) -O2 src/gpu/backend.cc -shared $(LINK_FLAGS) $(LDFLAGS) -o $@

$(BUILD)/libhepta.a: $(LIB_OBJECTS)
	rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/libhepta.so.$(VERSION): $(LIB_OBJECTS) src/hepta.map
	$(CC) -shared -fopenmp $(LINK_FLAGS) -Wl,-soname,libhepta.so.$(SOVERSION) \
		-Wl,--version-script=src/hepta.map $(LDFLAGS) $(LIB_OBJECTS) -o $@ $(LIBS)

$(BUILD)/libhepta.so: $(BUILD)/libhepta.so.$(VERSION)
	ln -sf libhepta.so.$(VERSION) $(BUILD)/libhepta.so.$(SOVERSION)
	ln -sf libhepta.so.$(SOVERSION) $@

$(BUILD)/hepta: $(CLI_OBJECTS) $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

# tests/test_allocation.c counts the calls of these functions.
comma := ,
WRAPPED := $(addprefix -Wl$(comma)--wrap=,malloc calloc realloc aligned_alloc posix_memalign mmap)
$(BUILD)/test: $(TEST_OBJECTS) $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $(WRAPPED) $^ -o $@ $(LIBS)

$(BUILD)/logits_dump: $(BUILD)/tests/logits_dump.o $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

$(BUILD)/tensor_dump: $(BUILD)/tests/tensor_dump.o $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

# Tests of the layers that need libc alone, for cross builds: ENGINE_ONLY=1.
ENGINE_TESTS := $(addprefix tests/,main.c amx_model.c test_base.c test_code.c test_kernels.c test_format.c \
	test_format_hepta.c test_dequantize.c test_tiny_model.c test_model.c test_team.c)
$(BUILD)/engine-test: $(ENGINE_TESTS:%.c=$(BUILD)/%.o) $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

# What scripts/test-gpu runs, with ENGINE_ONLY=1 and HEPTA_TEST_DEVICE=cuda.
GPU_TESTS := $(addprefix tests/,main.c test_gpu.c test_tiny_model.c)
$(BUILD)/gpu-test: $(GPU_TESTS:%.c=$(BUILD)/%.o) $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

$(BUILD)/gpu_table: $(BUILD)/tests/gpu_table.o $(BUILD)/libhepta.a
	$(CC) -fopenmp $(LINK_FLAGS) $(LDFLAGS) $^ -o $@ $(LIBS)

deps:
	scripts/deps

clean:
	rm -rf build build-*

-include $(LIB_OBJECTS:.o=.d) $(CLI_OBJECTS:.o=.d) $(TEST_OBJECTS:.o=.d) \
	$(BUILD)/tests/logits_dump.d $(BUILD)/tests/tensor_dump.d $(BUILD)/tests/gpu_table.d

# ---- What users and developers run --------------------------------------

MODEL := models/hepta-stories-7m.hepta
PROMPT ?= Once upon a time, in a little house at the edge of the forest, there lived
SEED ?= 7

demo: # builds and lets the bundled model write a story
	@scripts/deps
	@$(MAKE) --no-print-directory -s $(BUILD)/hepta
	@$(BUILD)/hepta run $(MODEL) --echo --stats --seed $(SEED) -n 300 -p "$(PROMPT)"

test: # builds and passes every test
	@scripts/deps test
	@$(MAKE) --no-print-directory run-tests HEPTA_PYTHON=.venv/bin/python

.PHONY: run-tests
run-tests: all $(BUILD)/test $(BUILD)/logits_dump $(BUILD)/tensor_dump $(BUILD)/libhepta-emulated.so
	HEPTA_BUILD=$(BUILD) HEPTA_PYTHON=$(HEPTA_PYTHON) $(BUILD)/test $(TEST_FLAGS)

.PHONY: test-gpu
test-gpu: # one table about this machine's NVIDIA GPU: the same bits, speed, memory
	@scripts/test-gpu

check: # the gate before a commit: format, both compilers, warnings, tests, sanitizers, docs
	@scripts/deps check
	scripts/check

ci: check

# Short runs of a few minutes; the full ones: make bench BENCH_MODEL= BENCH_KERNELS= SHAPES="..."
SHAPES ?= tinyllama-1.1b
BENCH_MODEL ?= -p 256 -n 32 --runs 3
BENCH_KERNELS ?= --runs 1 --milliseconds 50

bench: $(BUILD)/hepta # speed here: the code, the kernels, the bundled model, models of known shapes
	$(BUILD)/hepta bench code
	$(BUILD)/hepta bench kernels $(BENCH_KERNELS)
	$(BUILD)/hepta bench $(MODEL) --busy 1
	@mkdir -p $(BUILD)/bench
	@for shape in $(SHAPES); do file=$(BUILD)/bench/$$shape.hepta; \
		if [ ! -e $$file ]; then $(BUILD)/hepta synth $$shape -o $$file || exit 1; fi; \
		$(BUILD)/hepta bench $$file --busy 1 $(BENCH_MODEL) || exit 1; done

compare: $(BUILD)/hepta # the same models by Hepta and llama.cpp, which this installs and builds
	@scripts/deps bench
	.venv-bench/bin/python bench/compare --hepta $(BUILD)/hepta $(COMPARE)

quality: $(BUILD)/hepta # the tables of docs/QUALITY.md; QUALITY_FLAGS="--llama-bin DIR" adds llama.cpp's types
	$(or $(HEPTA_PYTHON),python3) bench/quality --build $(BUILD) $(QUALITY_FLAGS)

format:
	clang-format -i $(wildcard include/*.h src/*/*.[ch] src/gpu/*.cc tests/*.[ch] examples/*.c tools/*/*.[ch])

install: all
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/pkgconfig \
		$(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/share/hepta
	install -m 755 $(BUILD)/hepta $(DESTDIR)$(PREFIX)/bin/hepta
	for b in cuda hip; do [ ! -e $(BUILD)/libhepta-$$b.so ] || \
		install -m 755 $(BUILD)/libhepta-$$b.so $(DESTDIR)$(PREFIX)/lib/; done
	install -m 644 include/hepta.h $(DESTDIR)$(PREFIX)/include/hepta.h
	install -m 644 $(BUILD)/libhepta.a $(DESTDIR)$(PREFIX)/lib/libhepta.a
	install -m 755 $(BUILD)/libhepta.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/
	ln -sf libhepta.so.$(VERSION) $(DESTDIR)$(PREFIX)/lib/libhepta.so.$(SOVERSION)
	ln -sf libhepta.so.$(SOVERSION) $(DESTDIR)$(PREFIX)/lib/libhepta.so
	install -m 644 $(MODEL) $(DESTDIR)$(PREFIX)/share/hepta/
	sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' src/hepta.pc.in \
		>$(DESTDIR)$(PREFIX)/lib/pkgconfig/hepta.pc

uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/hepta $(DESTDIR)$(PREFIX)/include/hepta.h \
		$(DESTDIR)$(PREFIX)/lib/libhepta-cuda.so $(DESTDIR)$(PREFIX)/lib/libhepta-hip.so \
		$(DESTDIR)$(PREFIX)/lib/libhepta.a $(DESTDIR)$(PREFIX)/lib/libhepta.so* \
		$(DESTDIR)$(PREFIX)/lib/pkgconfig/hepta.pc \
		$(DESTDIR)$(PREFIX)/share/hepta/$(notdir $(MODEL))
