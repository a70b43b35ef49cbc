// A notebook's cell, by anywidget.

import { mount } from "./main.js";
import { modelSource } from "./source.js";

export default {
  render({ model, el }) {
    el.classList.add("vistvis-cell");
    el.vistvis = mount(el, modelSource(model));
  },
};
