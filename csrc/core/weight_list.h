// The list of a layer's weights: (w_ih, w_hh[, b_ih, b_hh][, w_hr]) for each direction. The length
// of the list gives the number of directions.
#pragma once

namespace rnnkern {

struct WeightList {
  bool bias, projection;
  int per_direction, directions;

  WeightList(int count, bool third_is_a_vector)
      : bias(third_is_a_vector),
        projection(count % (bias ? 5 : 3) == 0),
        per_direction((bias ? 4 : 2) + projection),
        directions(count / per_direction) {}

  bool fits(int count) const {
    return (directions == 1 || directions == 2) && directions * per_direction == count;
  }
};

}  // namespace rnnkern
