// Stands before csrc/ptx/cp_async.cuh on the include path: a copy lands at any time between its start and the
// wait.
#pragma once

#include "cuda_on_host.h"

namespace cips {

inline void land(const host::Copy& copy)
{
    std::memcpy(copy.target, copy.source, 16);
}

inline void cp_async_16(void* shared, const void* global)
{
    const host::Copy copy{shared, global};
    if (host::order() % 2) {
        land(copy);
    } else {
        host::self().groups.back().push_back(copy);
    }
}

inline void cp_async_commit()
{
    host::self().groups.emplace_back();
}

template <int kPending>
void cp_async_wait()
{
    auto& groups = host::self().groups;
    while (static_cast<int>(groups.size()) - 1 > kPending) {
        for (const host::Copy& copy : groups.front()) land(copy);
        groups.erase(groups.begin());
    }
}

}  // namespace cips
