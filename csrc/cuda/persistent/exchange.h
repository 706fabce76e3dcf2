// The exchange that a tiling has, and its memory.
#pragma once
#include <type_traits>

#include "../params.h"
#include "cluster_exchange.h"
#include "grid_exchange.h"

namespace rnnkern::cuda {

template <class T, class Config>
using ExchangeFor =
    std::conditional_t<Config::kGroup == Group::grid, GridExchange<T, Config>,
                       std::conditional_t<Config::kGroup == Group::cluster,
                                          ClusterExchange<T, Config>, BlockExchange<T, Config>>>;

// Bytes of global memory for a group of blocks and a direction.
template <class T, class Config>
int64_t exchange_bytes(const PersistentForwardParams*, int blocks) {
  return Config::kGroup == Group::grid ? grid_h_bytes<T, Config>(blocks) : 0;
}
template <class T, class Config>
int64_t exchange_bytes(const PersistentBackwardParams*, int blocks) {
  return Config::kGroup == Group::grid ? grid_dh_bytes<Config>(blocks) : 0;
}

// That of this group.
template <class Config, class Params>
RNNKERN_DEVICE void* exchange_memory(const Params& p) {
  if constexpr (Config::kGroup == Group::grid)
    return static_cast<char*>(p.exchange) + group_in_grid() * p.exchange_bytes;
  else
    return nullptr;
}

// The group's first batch row. Only a grid has launches that begin at others than the first.
template <class Config, class Params>
RNNKERN_DEVICE int first_row(const Params& p) {
  const int in_launch = group_in_grid() * Config::kBatchRows;
  return Config::kGroup == Group::grid ? int(p.first_row) + in_launch : in_launch;
}

}  // namespace rnnkern::cuda
