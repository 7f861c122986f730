// Every CUDA return code becomes an exception; the caller's current device comes back whatever happens.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace cips {

/// Throws std::runtime_error with the call, CUDA's name of the error and its description.
inline void check_cuda(cudaError_t code, const char* call)
{
    if (code == cudaSuccess) return;
    cudaGetLastError();  // reported here, it must not appear again in somebody else's check
    throw std::runtime_error(std::string(call) + ": " + cudaGetErrorName(code) + ": " + cudaGetErrorString(code));
}

/// Makes `device` current for the life of the object.
class DeviceGuard {
public:
    explicit DeviceGuard(int device)
    {
        check_cuda(cudaGetDevice(&before_), "cudaGetDevice");
        if (device != before_) {
            check_cuda(cudaSetDevice(device), "cudaSetDevice");
            changed_ = true;
        }
    }

    ~DeviceGuard()
    {
        if (changed_) cudaSetDevice(before_);
    }

    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

}  // namespace cips
