// A flat C interface to what the CPU benchmark calls of ggml and llama.cpp; see cpu_llama.py.
//
// Compiled against the headers of the very sources that are measured, so that no structure has to
// be written down a second time. A function that fails returns null or -1.

#include <cstdint>
#include <cstring>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"
#include "llama.h"

namespace {

void say_nothing(ggml_log_level, const char *, void *) {}

ggml_backend_t cpu_backend() {
    static ggml_backend_t backend = (ggml_log_set(say_nothing, nullptr), ggml_backend_cpu_init());
    return backend;
}

// Where llama.cpp would put a weight: buffers that reorder it come first (AMX, repacking), the
// plain one last.
std::vector<ggml_backend_buffer_type_t> buffer_types() {
    std::vector<ggml_backend_buffer_type_t> found;
    ggml_backend_dev_t device = ggml_backend_get_device(cpu_backend());
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(device);
    auto extra = reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(
        ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
    if (extra != nullptr) {
        for (ggml_backend_buffer_type_t * each = extra(device); each && *each; ++each) {
            found.push_back(*each);
        }
    }
    found.push_back(ggml_backend_cpu_buffer_type());
    return found;
}

ggml_context * tensor_context() {
    return ggml_init({64 * ggml_tensor_overhead() + ggml_graph_overhead(), nullptr, true});
}

struct Weight {
    ggml_context * context;
    ggml_tensor * tensor;
    ggml_backend_buffer_t buffer;
};

struct Product {
    ggml_context * context;
    ggml_tensor *x, *y;
    ggml_cgraph * graph;
    ggml_backend_buffer_t buffer;
};

}  // namespace

extern "C" {

// Returns the number of a ggml type by its name ("q4_0"), or -1.
int bench_type(const char * name) {
    for (int type = 0; type < GGML_TYPE_COUNT; ++type) {
        const char * known = ggml_type_name(static_cast<ggml_type>(type));
        if (known && std::strcmp(known, name) == 0) return type;
    }
    return -1;
}

int64_t bench_row_bytes(int type, int64_t columns) {
    return static_cast<int64_t>(ggml_row_size(static_cast<ggml_type>(type), columns));
}

// Quantizes float32 [rows, columns] into `packed`.
void bench_quantize(int type, const float * weight, void * packed, int64_t rows, int64_t columns) {
    ggml_quantize_chunk(static_cast<ggml_type>(type), weight, packed, 0, rows, columns, nullptr);
}

// Decodes `packed` into float32 [rows, columns]: what the product is compared with.
void bench_decode(int type, const void * packed, float * weight, int64_t rows, int64_t columns) {
    const auto * traits = ggml_get_type_traits(static_cast<ggml_type>(type));
    const auto stride = ggml_row_size(static_cast<ggml_type>(type), columns);
    for (int64_t row = 0; row < rows; ++row) {
        traits->to_float(static_cast<const char *>(packed) + row * stride, weight + row * columns,
                         columns);
    }
}

// Returns a weight in the buffer that llama.cpp would take for it.
void * bench_weight(int type, const void * packed, int64_t rows, int64_t columns) {
    for (ggml_backend_buffer_type_t kind : buffer_types()) {
        ggml_context * context = tensor_context();
        ggml_tensor * weight =
            ggml_new_tensor_2d(context, static_cast<ggml_type>(type), columns, rows);
        ggml_tensor * x = ggml_new_tensor_2d(context, GGML_TYPE_F32, columns, 512);
        ggml_tensor * product = ggml_mul_mat(context, weight, x);
        // As llama.cpp asks: with an empty buffer of that kind behind the weight.
        weight->buffer = ggml_backend_buft_alloc_buffer(kind, 0);
        const bool runs = weight->buffer != nullptr &&
            ggml_backend_dev_supports_op(ggml_backend_get_device(cpu_backend()), product);
        ggml_backend_buffer_free(weight->buffer);
        weight->buffer = nullptr;
        ggml_backend_buffer_t buffer = nullptr;
        if (runs) {
            const size_t size = ggml_backend_buft_get_alloc_size(kind, weight);
            buffer = ggml_backend_buft_alloc_buffer(kind, size);
        }
        if (buffer == nullptr) {
            ggml_free(context);
            continue;
        }
        ggml_backend_buffer_set_usage(buffer, GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        ggml_backend_tensor_alloc(buffer, weight, ggml_backend_buffer_get_base(buffer));
        ggml_backend_tensor_set(weight, packed, 0, ggml_nbytes(weight));
        return new Weight{context, weight, buffer};
    }
    return nullptr;
}

const char * bench_buffer_name(void * weight) {
    return ggml_backend_buffer_name(static_cast<Weight *>(weight)->buffer);
}

void bench_free_weight(void * handle) {
    auto * weight = static_cast<Weight *>(handle);
    ggml_backend_buffer_free(weight->buffer);
    ggml_free(weight->context);
    delete weight;
}

// Returns the product of a weight and `tokens` rows of float32 activations, ready to be run.
void * bench_product(void * handle, int64_t tokens) {
    auto * weight = static_cast<Weight *>(handle);
    ggml_context * context = tensor_context();
    ggml_tensor * x = ggml_new_tensor_2d(context, GGML_TYPE_F32, weight->tensor->ne[0], tokens);
    ggml_tensor * y = ggml_mul_mat(context, weight->tensor, x);
    ggml_cgraph * graph = ggml_new_graph(context);
    ggml_build_forward_expand(graph, y);
    ggml_backend_buffer_t buffer =
        ggml_backend_alloc_ctx_tensors_from_buft(context, ggml_backend_cpu_buffer_type());
    if (buffer == nullptr) {
        ggml_free(context);
        return nullptr;
    }
    return new Product{context, x, y, graph, buffer};
}

int bench_set_x(void * product, const float * x) {
    ggml_tensor * target = static_cast<Product *>(product)->x;
    std::memcpy(target->data, x, ggml_nbytes(target));
    return 0;
}

int bench_run(void * product, int threads) {
    ggml_backend_cpu_set_n_threads(cpu_backend(), threads);
    return ggml_backend_graph_compute(cpu_backend(), static_cast<Product *>(product)->graph) ==
            GGML_STATUS_SUCCESS ? 0 : -1;
}

int bench_get_y(void * product, float * y) {
    const ggml_tensor * source = static_cast<Product *>(product)->y;
    std::memcpy(y, source->data, ggml_nbytes(source));
    return 0;
}

void bench_free_product(void * handle) {
    auto * product = static_cast<Product *>(handle);
    ggml_backend_buffer_free(product->buffer);
    ggml_free(product->context);
    delete product;
}

// Returns a model and its context for `length` tokens, or null.
void * bench_model(const char * file, int length, int threads) {
    llama_log_set(say_nothing, nullptr);
    llama_backend_init();
    llama_model_params parameters = llama_model_default_params();
    parameters.n_gpu_layers = 0;
    llama_model * model = llama_model_load_from_file(file, parameters);
    if (model == nullptr) return nullptr;
    llama_context_params options = llama_context_default_params();
    options.n_ctx = length;
    options.n_batch = options.n_ubatch = 512;
    options.n_threads = options.n_threads_batch = threads;
    return llama_init_from_model(model, options);
}

// Runs `count` tokens behind those before; returns the logits of the last one, or null.
const float * bench_step(void * context, int32_t * tokens, int count) {
    auto * session = static_cast<llama_context *>(context);
    if (llama_decode(session, llama_batch_get_one(tokens, count)) != 0) return nullptr;
    return llama_get_logits_ith(session, -1);
}

void bench_forget(void * context) {
    llama_memory_clear(llama_get_memory(static_cast<llama_context *>(context)), false);
}

void bench_threads(void * context, int threads) {
    llama_set_n_threads(static_cast<llama_context *>(context), threads, threads);
}

}  // extern "C"
