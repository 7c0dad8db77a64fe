// oneDNN behind the line protocol of src/server.rs, in the layout given as argument: NCHW, NHWC, nChw8c or nChw16c.

#include <chrono>
#include <cstddef>
#include <exception>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <omp.h>
#include <oneapi/dnnl/dnnl.hpp>

using dnnl::memory;
using dnnl::normalization_flags;
using dnnl::prop_kind;
using tag = memory::format_tag;
using type = memory::data_type;
using arguments = std::unordered_map<int, memory>;

constexpr float eps = 1e-5F;

tag tag_of(const std::string &layout) {
    if (layout == "NCHW") return tag::nchw;
    if (layout == "NHWC") return tag::nhwc;
    if (layout == "nChw8c") return tag::nChw8c;
    if (layout == "nChw16c") return tag::nChw16c;
    throw std::invalid_argument("no such layout: " + layout);
}

// Inputs in the peer's layout and type, and the primitive to be timed.
class problem {
public:
    std::string implementation;

    problem(const std::string &layout, std::istream &request) : stream_(engine_) {
        std::string pass, dtype;
        memory::dim n = 0, c = 0, h = 0, w = 0;
        int threads = 0;
        request >> pass >> dtype >> n >> c >> h >> w >> threads >> std::ws;
        std::getline(request, directory_);
        if (!request) throw std::invalid_argument("setup lacks arguments");
        omp_set_num_threads(threads);

        // Tensors cross in NCHW and f32, whatever they are computed in.
        crossing_ = {{n, c, h, w}, type::f32, tag::nchw};
        tensor_ = {{n, c, h, w}, dtype == "bf16" ? type::bf16 : type::f32, tag_of(layout)};
        channels_ = {{c}, type::f32, tag::a};

        const auto affine = normalization_flags::use_scale | normalization_flags::use_shift;
        const auto x = read("x", crossing_, tensor_);
        const auto gamma = read("gamma", channels_, channels_), beta = read("beta", channels_, channels_);
        if (pass == "inference") {
            const auto mean = read("mean", channels_, channels_), var = read("var", channels_, channels_);
            results_ = {{"y", memory(tensor_, engine_)}};
            prepare<dnnl::batch_normalization_forward>(
                    {engine_, prop_kind::forward_inference, tensor_, tensor_, eps,
                            affine | normalization_flags::use_global_stats},
                    {{DNNL_ARG_SRC, x}, {DNNL_ARG_DST, results_[0].second}, {DNNL_ARG_MEAN, mean},
                            {DNNL_ARG_VARIANCE, var}, {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_SHIFT, beta}});
            return;
        }
        const memory mean(channels_, engine_), var(channels_, engine_), y(tensor_, engine_);
        const dnnl::batch_normalization_forward::primitive_desc forward(
                engine_, prop_kind::forward_training, tensor_, tensor_, eps, affine);
        results_ = {{"y", y}};
        prepare<dnnl::batch_normalization_forward>(forward,
                {{DNNL_ARG_SRC, x}, {DNNL_ARG_DST, y}, {DNNL_ARG_MEAN, mean}, {DNNL_ARG_VARIANCE, var},
                        {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_SHIFT, beta}});
        if (pass == "forward") return;

        call();
        const auto dy = read("dy", crossing_, tensor_);
        results_ = {{"dx", memory(tensor_, engine_)}, {"dgamma", memory(channels_, engine_)},
                {"dbeta", memory(channels_, engine_)}};
        prepare<dnnl::batch_normalization_backward>(
                {engine_, prop_kind::backward, tensor_, tensor_, tensor_, eps, affine, forward},
                {{DNNL_ARG_SRC, x}, {DNNL_ARG_DIFF_DST, dy}, {DNNL_ARG_MEAN, mean}, {DNNL_ARG_VARIANCE, var},
                        {DNNL_ARG_SCALE, gamma}, {DNNL_ARG_DIFF_SRC, results_[0].second},
                        {DNNL_ARG_DIFF_SCALE, results_[1].second}, {DNNL_ARG_DIFF_SHIFT, results_[2].second}});
    }

    void result() {
        call();
        for (auto &[name, values] : results_) {
            auto plain = to(values, values.get_desc() == tensor_ ? crossing_ : channels_);
            std::ofstream file(directory_ + "/" + name, std::ios::binary);
            file.write(static_cast<const char *>(plain.get_data_handle()),
                    static_cast<std::streamsize>(plain.get_desc().get_size()));
            if (!file.flush()) throw std::runtime_error("cannot write " + name);
        }
    }

    double time(int calls) {
        using clock = std::chrono::steady_clock;
        for (int i = 0; i < calls; ++i) call();
        const auto started = clock::now();
        for (int i = 0; i < calls; ++i) call();
        return std::chrono::duration<double, std::micro>(clock::now() - started).count() / calls;
    }

private:
    dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
    dnnl::stream stream_;
    std::string directory_;
    memory::desc crossing_, tensor_, channels_;
    dnnl::primitive primitive_;
    arguments arguments_;
    std::vector<std::pair<std::string, memory>> results_;

    template <typename Primitive>
    void prepare(const typename Primitive::primitive_desc &desc, arguments with) {
        primitive_ = Primitive(desc);
        arguments_ = std::move(with);
        implementation = desc.impl_info_str();
    }

    void call() {
        primitive_.execute(stream_, arguments_);
        stream_.wait();
    }

    memory to(memory from, const memory::desc &desc) {
        memory copy(desc, engine_);
        dnnl::reorder(from, copy).execute(stream_, from, copy);
        stream_.wait();
        return copy;
    }

    memory read(const std::string &name, const memory::desc &stored, const memory::desc &wanted) {
        memory values(stored, engine_);
        std::ifstream file(directory_ + "/" + name, std::ios::binary);
        file.read(static_cast<char *>(values.get_data_handle()), static_cast<std::streamsize>(stored.get_size()));
        if (!file) throw std::runtime_error("cannot read " + name);
        return to(values, wanted);
    }
};

int main(int, char **argv) {
    const std::string layout = argv[1];
    std::unique_ptr<problem> current;
    const auto version = dnnl::version();
    std::cout << "ok " << version->major << '.' << version->minor << '.' << version->patch << std::endl;
    for (std::string line; std::getline(std::cin, line);) {
        try {
            std::istringstream request(line);
            std::string verb;
            request >> verb;
            if (verb == "setup") {
                current.reset(); // gives back its memory first
                current = std::make_unique<problem>(layout, request);
                std::cout << "ok " << current->implementation << std::endl;
            } else if (verb == "result" && current) {
                current->result();
                std::cout << "ok" << std::endl;
            } else if (int calls = 0; verb == "time" && current && request >> calls) {
                std::cout << "ok " << current->time(calls) << std::endl;
            } else {
                throw std::invalid_argument("no such request: " + line);
            }
        } catch (const std::exception &error) {
            std::cout << "error " << error.what() << std::endl;
        }
    }
}
